"""Conversations about images as token ids, and which of these the assistant says."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from dtpvit.errors import UserError

__all__ = ["IMAGE_ID", "Chat", "Encoded", "Role", "Template", "Turn"]

IMAGE_ID = -200  # LLaVA's number; of no vocabulary, so that no text can be tokenized into it
Role = Literal["system", "user", "assistant"]
Template = Literal["chatml", "vicuna_v1", "plain", "tokenizer"]

_CHATML = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
# The space before an answer belongs to it: after the colon that ends a prompt, the model has to say it.
_VICUNA = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.{% endif %}{{ ' ' }}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}USER: {{ message.content }}{{ ' ' }}"
    "{% elif message.role == 'assistant' %}"
    "ASSISTANT:{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_PLAIN = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ '\n' }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}"
)
_TEMPLATES = {"chatml": _CHATML, "vicuna_v1": _VICUNA, "plain": _PLAIN}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "\uf8ff"  # of Unicode's private use; every token that is added in memory starts with it


@dataclass(frozen=True)
class Turn:
    """What one side says at a time.

    Attributes:
        role: Who speaks.
        parts: Text, and None for each image, in order.
    """

    role: Role
    parts: tuple[str | None, ...]


class Encoded(NamedTuple):
    """A conversation's token ids, ``IMAGE_ID`` at each image, and which of them the assistant said."""

    ids: list[int]
    supervised: list[bool]


class Chat:
    """A tokenizer with a chat template.

    What is supervised comes from the template's ``{% generation %}`` marks, not from counting: the assistant's answers,
    each with the token that ends it. Text that spells a control token (``<|im_end|>``) is tokenized as the characters
    it consists of, so that nobody can end another's turn; blanks around an answer are no part of it.

    Args:
        tokenizer: A fast one of transformers; it is copied, not changed.
        template: ``chatml`` (Qwen, SmolLM2), ``vicuna_v1`` (LLaVA-1.5's, with its system prompt unless the conversation
            has another), ``plain`` (its first stage's: images, then the answer and a line break, no questions), or
            ``tokenizer`` for the tokenizer's own, which must have generation marks.

    Attributes:
        tokenizer: As given.
        template: As given.

    Raises:
        UserError: If the template is unknown, or does not fit the tokenizer.
    """

    def __init__(self, tokenizer: Any, template: Template = "chatml") -> None:
        from transformers import AddedToken

        self.tokenizer, self.template = tokenizer, template
        self._jinja = _jinja(tokenizer, template)
        controls = _control_tokens(tokenizer)
        self._controls = set(controls.values())
        # Each of these is a word of the copy alone. It has no embedding: ids of these words are replaced at once.
        self._marks = {spelled: f"{_MARK}{number}{_MARK}" for number, spelled in enumerate([*controls, _MARK], 1)}
        self._spelled = re.compile("|".join(map(re.escape, sorted(self._marks, key=len, reverse=True))))
        self._image = f"{_MARK}0{_MARK}"
        self._marked = copy.deepcopy(tokenizer)
        self._marked.add_tokens(
            [AddedToken(mark, special=True, normalized=False) for mark in [self._image, *self._marks.values()]]
        )
        _cover_blanks(self._marked)
        self._image_mark_id = self._marked.convert_tokens_to_ids(self._image)
        self._written = {self._image_mark_id: [IMAGE_ID]} | {
            self._marked.convert_tokens_to_ids(mark): _as_text(tokenizer, spelled, self._controls)
            for spelled, mark in self._marks.items()
        }
        self._end_ids = self._ends()

    @property
    def pad_id(self) -> int:
        """What fills a batch's rows up; nothing depends on it, so that a tokenizer without pad token will do."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None)

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end an answer; with ``plain`` all that contain a line break too."""
        return list(self._end_ids)

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        """A whole conversation to learn from.

        Raises:
            UserError: If the tokenizer's own template refuses it.
        """
        ids, mask = self._tokens(turns, add_generation_prompt=False)
        found = Encoded([], [])
        for token, said in zip(ids, mask, strict=True):
            written = self._written.get(token, (token,))
            found.ids.extend(written)
            found.supervised.extend(bool(said) and new != IMAGE_ID for new in written)
        return found

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """A conversation up to where the assistant is to speak.

        Raises:
            UserError: If the tokenizer's own template refuses it.
        """
        ids, _ = self._tokens(turns, add_generation_prompt=True)
        return [new for token in ids for new in self._written.get(token, (token,))]

    def text(self, ids: Sequence[int]) -> str:
        """What tokens say, without control tokens, images, and blanks around it."""
        words = [token for token in ids if token >= 0]
        return self.tokenizer.decode(words, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def _tokens(self, turns: Sequence[Turn], *, add_generation_prompt: bool) -> tuple[list[int], list[int]]:
        messages = [{"role": turn.role, "content": self._content(turn)} for turn in turns]
        try:
            found = self._marked.apply_chat_template(
                messages,
                chat_template=self._jinja,
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except Exception as error:
            if self.template != "tokenizer":
                raise
            raise UserError(
                f"The tokenizer's own chat template refuses a conversation ({str(error).splitlines()[0]}): "
                "use the template chatml or vicuna_v1."
            ) from error
        ids, images = found["input_ids"], sum(turn.parts.count(None) for turn in turns)
        if (places := ids.count(self._image_mark_id)) != images:
            raise UserError(
                f"The tokenizer's own chat template leaves places for {places} of {images} images: "
                "use the template chatml or vicuna_v1."
            )
        return ids, found["assistant_masks"]

    def _content(self, turn: Turn) -> str:
        """The turn's text in one string, marks at its images and in place of control tokens."""
        if self.template == "plain" and turn.role != "assistant":
            return "".join(self._image for part in turn.parts if part is None)
        runs = [""]
        for part in turn.parts:
            if part is None:
                runs.append("")
            else:
                runs[-1] += part
        if turn.role == "assistant":
            runs[0] = runs[0].lstrip()
            runs[-1] = runs[-1].rstrip()
        return self._image.join(self._harmless(run) for run in runs)

    def _harmless(self, text: str) -> str:
        # Half a surrogate pair, which JSON can hold, is no text that can be tokenized.
        text = text.encode("utf-8", "replace").decode()
        return self._spelled.sub(lambda match: self._marks[match[0]], text)

    def _ends(self) -> list[int]:
        eos = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        if self.template == "plain":
            texts = self.tokenizer.batch_decode([[number] for number in range(len(self.tokenizer))])
            return [number for number, text in enumerate(texts) if "\n" in text] + eos
        probe = self.encode([Turn("user", ("a",)), Turn("assistant", ("b",))])
        said = [token for token, by_assistant in zip(*probe, strict=True) if by_assistant]
        ends = [token for token in said if token in self._controls]
        if not ends:
            raise UserError(
                f"With the template {self.template} no control token of this tokenizer ends what the assistant says, "
                "so that a model would not learn to stop: use another template or tokenizer."
            )
        return list(dict.fromkeys([ends[0], *eos]))


def _jinja(tokenizer: Any, template: str) -> str:
    if template not in get_args(Template):
        raise UserError(f"The chat template is {template!r}; choose one of {', '.join(get_args(Template))}.")
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"The tokenizer is a {type(tokenizer).__name__}, which does not tell where a token lies in the text: "
            "give a fast tokenizer (one with a tokenizer.json)."
        )
    if template == "chatml" and not {"<|im_start|>", "<|im_end|>"} <= set(_control_tokens(tokenizer)):
        raise UserError(
            "The tokenizer has no <|im_start|> and <|im_end|>, which the template chatml is made of: "
            "use the template vicuna_v1, which ends answers with the end-of-text token."
        )
    if template != "tokenizer":
        return _TEMPLATES[template]
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if own is None or not _GENERATION.search(own):
        raise UserError(
            f"The tokenizer has {'no chat template' if own is None else 'a chat template without generation marks'}, "
            "where one is needed that tells what the assistant says: use the template chatml or vicuna_v1."
        )
    return own


def _control_tokens(tokenizer: Any) -> dict[str, int]:
    """Every token that text must not spell: the special ones, and those that are written like one."""
    return {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content.startswith("<") and token.content.endswith(">"))
    }


def _as_text(tokenizer: Any, spelled: str, controls: set[int]) -> list[int]:
    """The ids of a control token's characters."""
    whole = tokenizer(spelled, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if controls.isdisjoint(whole):
        return whole
    single = [tokenizer(char, add_special_tokens=False, split_special_tokens=True)["input_ids"] for char in spelled]
    return [token for ids in single for token in ids]


def _cover_blanks(tokenizer: Any) -> None:
    """Let the offset of a word that starts with a blank include the blank, where a template's mark may lie.

    Byte-level tokenizers have a post-processor that cuts it off; what else post-processors do, the template does.
    """
    from tokenizers.processors import ByteLevel

    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
