"""A model that answers in a conversation, piece by piece as it writes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from ..errors import UserError
from ..settings.chat import ChatConfig
from .answers import as_chat, settings_of

log = logging.getLogger("slimllm")


@dataclass
class Partner:
    """One model that answers. ``beginning``: the messages that each of its conversations begins with."""

    name: str
    model: object
    tokenizer: object
    beginning: list[dict]

    def pieces(self, messages: list[dict], config: ChatConfig) -> Iterator[str]:
        """The answer, piece by piece as it is written. A model without a chat template goes on from the last message.

        It ends at the latest where the positions do that the model was made for. Raises UserError for messages that its chat template
        does not take. Where the iterator is closed, the model stops writing.
        """
        ids = torch.tensor([self._within_positions(messages, config.new_tokens)], device=self.model.device)
        left = self.model.config.max_position_embeddings - ids.shape[1]
        settings = settings_of(self.model, self.tokenizer, min(config.new_tokens, left), config.temperature)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        enough, failed = threading.Event(), []
        stop = StoppingCriteriaList([lambda ids, scores: torch.full((len(ids),), enough.is_set(), device=ids.device)])

        def write():
            try:
                torch.manual_seed(config.seed)
                self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer, stopping_criteria=stop
                )
            except Exception as error:  # it is raised where the answer is read
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            enough.set()
            thread.join()
        if failed:
            raise failed[0]

    def _within_positions(self, messages: list[dict], new_tokens: int) -> list[int]:
        """The token ids of the conversation; its oldest turns are left out, which is said, where the model has no positions for them and
        an answer of ``new_tokens``, or of half of its positions. Raises UserError for a last message that is too long by itself.
        """
        most, begin, left_out = self.model.config.max_position_embeddings, len(self.beginning), 0
        ids = as_chat(self.tokenizer, messages)
        while len(ids) + min(new_tokens, most // 2) > most and self.tokenizer.chat_template and begin + left_out + 1 < len(messages):
            left_out += 2
            ids = as_chat(self.tokenizer, [*self.beginning, *messages[begin + left_out :]])
        if len(ids) >= most:
            raise UserError(f"the message comes to {len(ids)} tokens, and the model was made for {most} with its answer; shorten it")
        if left_out:
            left = f"its first {left_out} messages are left out"
            log.info("%s: the conversation is too long for the model's %d positions; %s", self.name, most, left)
        return ids

    def speed(self, text: str, seconds: float) -> str:
        """How fast it wrote the text, in words."""
        tokens = len(self.tokenizer(text, add_special_tokens=False).input_ids)
        return f"{self.name}: {tokens} tokens, {tokens / seconds:.1f} per second"
