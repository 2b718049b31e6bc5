"""``report.html``: one run on one page that opens from the disk and asks nothing of the network. Its text is ``page.html.jinja``."""

from __future__ import annotations

from pathlib import Path

import jinja2

from ..settings.methods import METHODS, title_of
from ..utils.files import write_text
from . import summary
from .card import portable
from .figures import layer_svg
from .record import PruningRecord
from .tables import limits_line

FILE = "report.html"


def template(name: str) -> jinja2.Template:
    """The page ``name`` beside this file; what a run gives it is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(autoescape=True, loader=loader).get_template(name)


def write(folder: Path, run: PruningRecord, target: str, program: str, exports: bool) -> None:
    """Writes the page of a run into ``folder``; ``target``: where that will lie, ``program``: how this project's commands begin,
    ``exports``: as for :func:`summary.summary`.
    """
    lost, config = summary.nats_lost(run), run.config
    recipe = f", recipe {config['recipe']}" if config["recipe"] != "paper" else ""
    text = template("page.html.jinja").render(
        run=run,
        name=config["save_ckpt_log_name"],
        method=title_of(METHODS, config["method"]) + recipe,
        lost=lost,
        verdict=None if lost is None else summary.verdict(lost),
        sizes=summary.sizes(run, exports),
        limits=limits_line(run.evaluation),
        spent=summary.spent(run),
        chatted=summary.chatted(run),
        picture=layer_svg(run),
        steps=summary.next_steps(run, target, program, exports),
        command=portable(run.command),
        calibration=Path(run.calibration["source"]).name,
        settings=[(name, value) for name, value in {**config, **run.environment}.items() if value not in (None, (), [], "")],
    )
    write_text(Path(folder) / FILE, text)
