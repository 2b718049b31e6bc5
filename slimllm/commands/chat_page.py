"""The page of ``slimllm chat --browser``: the models side by side, answering the same message, on this machine alone."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator

from ..errors import UserError, first_line
from ..evaluation.partner import Partner
from ..settings.chat import ChatConfig

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported: nothing is sent anywhere

import gradio  # noqa: E402

log = logging.getLogger("slimllm")
FONT = ["system-ui", "sans-serif"]  # the usual ones come from the network


def page(partners: list[Partner], config: ChatConfig) -> gradio.Blocks:
    """The page, which is not served yet. Its function for other programs is ``/say``: a message -> the conversations and the speeds."""

    def say(text: str, *talks: list[dict]) -> Iterator[tuple]:
        """One model after the other: what it has written so far, until the last has ended."""
        talks = [list(talk or partner.beginning) for partner, talk in zip(partners, talks)]
        speeds = [""] * len(partners)
        for index, (partner, talk) in enumerate(zip(partners, talks)):
            talk.append({"role": "user", "content": text})
            asked, answer, started = list(talk), {"role": "assistant", "content": ""}, time.perf_counter()
            talk.append(answer)
            for piece in partner.pieces(_plain(asked), config):
                answer["content"] += piece
                speeds[index] = partner.speed(answer["content"], time.perf_counter() - started)
                yield "", *talks, *speeds

    with gradio.Blocks(title=" and ".join(partner.name for partner in partners), analytics_enabled=False) as blocks:
        with gradio.Row():
            columns = []
            for partner in partners:
                with gradio.Column():
                    columns.append((gradio.Chatbot(label=partner.name, height="65vh"), gradio.Markdown()))
        chats, speeds = [chat for chat, _ in columns], [speed for _, speed in columns]
        message = gradio.Textbox(placeholder="Write a message", show_label=False, autofocus=True)
        message.submit(say, [message, *chats], [message, *chats, *speeds], api_name="say")
        gradio.Button("New conversation").click(lambda: ["", *([] for _ in chats), *("" for _ in speeds)], None, [message, *chats, *speeds])
    return blocks


def _plain(messages: list[dict]) -> list[dict]:
    """Messages with a role and a text alone; a browser sends the parts of each, and more."""

    def text(content) -> str:
        return content if isinstance(content, str) else "".join(part["text"] for part in content if part.get("type") == "text")

    return [{"role": message["role"], "content": text(message["content"])} for message in messages]


def serve(partners: list[Partner], config: ChatConfig) -> None:
    """Serves the page to this machine until Ctrl-C."""
    app = page(partners, config)
    theme = gradio.themes.Default(font=FONT, font_mono=["monospace"])
    try:
        _, address, _ = app.launch(server_name="127.0.0.1", server_port=config.port, prevent_thread_lock=True, quiet=True, theme=theme)
    except OSError as error:
        raise UserError(f"--port {config.port or 'none given'}: the page cannot be served ({first_line(error)}); name another") from None
    log.info("open %s in a browser; Ctrl-C ends it", address)
    try:
        threading.Event().wait()
    except KeyboardInterrupt as error:
        error.arrived = True
    finally:
        app.close()
