"""Settings of ``slimllm export-gguf``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..cli import check_choice, check_choices, flag
from ..errors import UserError
from .common import OUTTYPES


@dataclass
class ExportConfig:
    """Settings of an export. Raises UserError where a value makes no sense."""

    folder: str | None = flag("checkpoint", "checkpoint folder, dense or pruned", positional=True, nargs="?")
    outtype: str = flag(
        "file", "type of the weight matrices: f32, f16, bf16 or q8_0; several with commas give several files", "f16", metavar="TYPE"
    )
    arch: str = flag(
        "file",
        "architecture in the file; auto: the family's own where all layers have one width, else one with widths per layer",
        "auto",
        choices=("auto", "llama", "deci"),
    )
    output: str | None = flag("file", "the file [DIR/NAME-OUTTYPE.gguf]")
    overwrite: bool = flag("file", "replace an existing file", False)

    def __post_init__(self):
        if not self.folder:
            raise UserError("name a checkpoint folder: slimllm export-gguf prune_log/NAME")
        check_choices(self)
        self.outtypes = tuple(dict.fromkeys(self.outtype.split(",")))
        for name in self.outtypes:
            check_choice("outtype", name, OUTTYPES)
        if self.output and len(self.outtypes) > 1:
            raise UserError("--output names one file: give one --outtype")

    def target(self, outtype: str) -> Path:
        folder = Path(self.folder)
        return Path(self.output) if self.output else folder / f"{folder.resolve().name}-{outtype}.gguf"
