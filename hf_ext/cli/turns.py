"""The text of one turn in a model's chat template, so that earlier turns never have to be rendered or read again."""

from typing import Any

ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}answer\N{OBJECT REPLACEMENT CHARACTER}"  # stands for an answer given earlier


class TurnFormat:
    """Renders the first turn of a conversation, and each later one as what follows the model's last answer.

    A later turn is cut out of a made-up conversation in which the answer is a known string: everything behind that
    string (the end of the answer, the user's words, the opening of the next answer) is what has to be appended. It
    does not depend on what was said, so it also serves templates that render old turns differently.

    Attributes:
        plain: text is continued as it is, without a template.
    """

    def __init__(self, tokenizer: Any, *, plain: bool = False, system: str | None = None) -> None:
        if not plain and not tokenizer.chat_template:
            raise ValueError("this model has no chat template; `hf-ext chat --plain` continues text as it is.")
        if plain and system is not None:
            raise ValueError("--system needs a chat template; it cannot be used with --plain.")
        self.tokenizer = tokenizer
        self.plain = plain
        self._system = [] if system is None else [{"role": "system", "content": system}]

    def first(self, text: str) -> list[int]:
        """Token ids of the first turn, system prompt included."""
        if self.plain:
            return self._without_end(self.tokenizer(text)["input_ids"])
        return self.ids(self._render([*self._system, {"role": "user", "content": text}]))

    def later(self, text: str) -> list[int]:
        """Token ids that follow the tokens of the model's last answer."""
        if self.plain:
            return self.ids(text)
        earlier = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": ANSWER}]
        rendered = self._render([*self._system, *earlier, {"role": "user", "content": text}])
        _, found, after = rendered.partition(ANSWER)
        if not found:
            raise ValueError("this model's chat template changes the answers it is given, so a chat cannot go on.")
        return self.ids(after)

    def _render(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise ValueError(f"this model's chat template refuses the conversation: {error}") from error

    def ids(self, text: str) -> list[int]:
        """Token ids of text as it is."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id != self.tokenizer.bos_token_id else ids
