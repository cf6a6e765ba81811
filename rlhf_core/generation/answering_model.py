"""A language model that is asked questions, local or at an OpenAI-compatible address: judges and critics stand on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from rlhf_core.config.answering_options import AnsweringModelConfig
from rlhf_core.infra.chat_api import ChatAPI
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.model_files import file_hashes
from rlhf_core.models.policy_model import PolicyModel


class AnsweringModel:
    """Answers chats by the model of a `AnsweringModelConfig`, which is loaded, or connected to, on first use."""

    def __init__(self, config: AnsweringModelConfig) -> None:
        self.config = config

    @property
    def is_local(self) -> bool:
        return self.config.base_url is None

    @cached_property
    def server(self) -> ChatAPI:
        config = self.config
        return ChatAPI(
            config.base_url or "",
            config.model,
            key_variable=config.key_variable,
            timeout=config.timeout,
            retries=config.retries,
        )

    @cached_property
    def policy(self) -> PolicyModel:
        config = self.config
        device = DeviceManager().device
        return PolicyModel.from_pretrained(config.model, precision=config.precision, frozen=True, device=device)

    def prepare(self) -> None:
        """Load the model, or check the address and its key.

        Raises:
            ModelError: a local model can't be loaded.
            ConfigError: the address isn't one of http, or its key isn't set.
        """
        _ = self.policy if self.is_local else self.server

    def describe(self) -> dict[str, Any]:
        """Return the hashes of a local model's files, as JSON values; {} for one at an address."""
        return {"files": file_hashes(self.config.model) or {}} if self.is_local else {}

    def ask(self, questions: Sequence[str], *, at_once: int = 1) -> list[str]:
        """Return the answer to each question, in order; a local model gets all of them together.

        A local model without a chat template continues the system message and the question as text.

        Args:
            at_once: most requests at one time to an address.

        Raises:
            PluginError: the server refuses, or doesn't answer.
        """
        config = self.config
        system = [] if config.system is None else [{"role": "system", "content": config.system}]
        chats = [[*system, {"role": "user", "content": text}] for text in questions]
        if not chats:
            return []
        if not self.is_local:
            options = {"temperature": config.temperature, "max_tokens": config.max_tokens}

            def answer(chat: Sequence[Mapping[str, str]]) -> str:
                return self.server.ask(chat, **options)

            if at_once == 1 or len(chats) == 1:
                return [answer(chat) for chat in chats]
            with ThreadPoolExecutor(at_once) as pool:
                return list(pool.map(answer, chats))
        plain = self.policy.tokenizer.chat_template is None
        prompts: list[Any] = ["\n\n".join(turn["content"] for turn in chat) for chat in chats] if plain else list(chats)
        drawn = self.policy.generate(prompts, max_new_tokens=config.max_tokens, temperature=config.temperature, seed=0)
        return [completions[0].text for completions in drawn]


def prompt_text(prompt: Any) -> str:
    """Return a prompt, a text or a chat, as the text that a question quotes; of one user turn alone its content."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0].get("content", ""))
    return "\n\n".join(f"{turn.get('role', '?')}: {turn.get('content', '')}" for turn in prompt)
