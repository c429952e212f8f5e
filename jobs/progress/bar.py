"""A line that says how much of something is done."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

_WIDEST, _NARROWEST = 40, 8


@dataclass(frozen=True)
class HowFar:
    """A name, a bar and numbers, of which a narrow terminal shows the numbers first.

    Attributes:
        of_what: that are counted.
    """

    name: Text
    done: int
    total: int
    of_what: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        numbers = f"{self.done}/{self.total} {self.of_what}"
        room = max(options.max_width - len(numbers) - 2, 2)
        bar = min(_WIDEST, max(room - self.name.cell_len, min(_NARROWEST, room // 2)))
        widths = min(room - bar, self.name.cell_len), bar, len(numbers)
        line = Table.grid(
            *(Column(width=width, no_wrap=True, overflow="ellipsis") for width in widths),
            padding=(0, 1),
        )
        shown = ProgressBar(total=max(self.total, 1), completed=self.done, width=bar)
        line.add_row(self.name, shown, numbers)
        yield line
