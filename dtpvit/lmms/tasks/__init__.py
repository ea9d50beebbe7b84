"""No tasks of our own; lmms-eval wants this folder of every plugin."""
