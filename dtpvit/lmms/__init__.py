"""dtpvit as a model of lmms-eval: ``lmms_eval --model dtpvit --model_args checkpoint=PATH --tasks pope``.

Installed, dtpvit is found by its entry point; versions before 0.7 need ``LMMS_EVAL_PLUGINS=dtpvit.lmms``.
"""
