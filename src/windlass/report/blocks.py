"""What a page is made of, as data: tables, bars and charts under the headings of sections.

The template knows how to print each kind of block and nothing about runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from windlass.report.curves import Chart

MANY_ROWS = 40
"""A longer table starts folded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A cell: its text, the exact value behind it, and a bar from 0 to 1 where it is one share of many."""

    text: str
    exact: str = ""
    share: float | None = None
    best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column's heading; numbers stand on the right."""

    title: str
    is_number: bool = False
    about: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table; its first column heads the rows."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    totals: tuple[Cell, ...] = ()
    is_sortable: bool = False
    is_wide: bool = True
    is_folded: bool = False
    kind: str = "table"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a bar: `share` of the longest bar's length."""

    label: str
    color: str
    share: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Stacked horizontal bars, each with a label, its parts and the whole in words."""

    title: str
    rows: tuple[tuple[str, tuple[Part, ...], str], ...]
    kind: str = "bars"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """Sentences beside a word whose `tone`, ``plain``, ``good``, ``fair`` or ``bad``, colours it."""

    word: str
    tone: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What is to be said before figures are shown."""

    title: str
    remarks: tuple[Remark, ...]
    kind: str = "words"


Block = Chart | Table | Bars | Words


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page under one heading; `key` names it in links."""

    key: str
    title: str
    blocks: tuple[Block, ...]


def section(key: str, title: str, *blocks: Block | None) -> Section | None:
    """A section of those blocks that are there; None where none is."""
    kept = tuple(block for block in blocks if block is not None)
    return Section(key=key, title=title, blocks=kept) if kept else None
