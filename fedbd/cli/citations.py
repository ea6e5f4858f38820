"""What to cite for a method: BibTeX, out of the papers that its own file names before "Differs from the paper:".

A file names a paper as ``Authors, "Title", Venue Year, https://...``. Nothing is added to what stands there, so an
entry has initials where the file has initials. Of Flower's strategies, whose files are not ours, the papers stand here.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from fedbd import __version__
from fedbd.errors import Problem, UserError
from fedbd.registry import METHODS, location, near_miss

FEDOPT = (
    'S. J. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konečný, S. Kumar, H. B. McMahan, "Adaptive Federated '
    'Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295'
)
STRATEGIES = {
    "fedavg": 'H. B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", '
    "AISTATS 2017, https://arxiv.org/abs/1602.05629",
    "fedavgm": 'Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual '
    'Classification", 2019, https://arxiv.org/abs/1909.06335',
    "fedprox": 'Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, '
    "https://arxiv.org/abs/1812.06127",
    "fedadagrad": FEDOPT,
    "fedadam": FEDOPT,
    "fedyogi": FEDOPT,
}
"""The papers that Flower names for its strategies."""

FEDBD = f"""\
@software{{fedbd,
  author = {{{{The fedbd developers}}}},
  title = {{{{fedbd: a federated-learning security simulator}}}},
  version = {{{__version__}}},
}}"""

JOURNALS = ("IEEE TDSC", "IEEE TIFS", "IEEE Access", "JMLR", "TMLR")
_WORD = r"[\w'-]+"
_INITIALS = r"(?:[A-ZÀ-Þ]\.[- ]?)+ ?"
_NAME = rf"(?:{_INITIALS})?(?:(?:van|von|de|der|den|la|le|el|al|di|da) )*[A-ZÀ-ÞŠŽČĆŁŚ]{_WORD}(?: et al\.| Jr\.)?"
_PAPER = re.compile(
    rf'(?<![\w.])(?P<authors>{_NAME}(?:(?:, and |, | and ){_NAME})*), "(?P<title>[^"]+?),?",? '
    r"(?:(?P<venue>[^\";]+?),? )?(?P<year>(?:19|20)\d\d)(?:,| \(|: )\s?\(?(?P<url>https://[^\s,;)]+)"
)


@dataclass(frozen=True)
class Paper:
    """A paper as a method's file names it."""

    authors: tuple[str, ...]
    title: str
    venue: str
    year: str
    url: str

    @property
    def key(self) -> str:
        """The entry's key: first author's last name, year, first word of the title."""
        last = self.authors[0].removesuffix(" et al.").split()[-1]
        words = re.findall(r"[A-Za-z]+", self.title)
        word = next((word for word in words if len(word) > 3), "".join(words[:1]))
        plain = unicodedata.normalize("NFKD", f"{last}{self.year}{word}").encode("ascii", "ignore").decode()
        return re.sub(r"[^a-z0-9]", "", plain.lower())

    def bibtex(self) -> str:
        """Return the entry."""
        volume = re.fullmatch(r"(?P<journal>.+) (?P<volume>\d+)(?:\((?P<number>\d+)\))?", self.venue)
        data = "Repository" in self.venue
        kind = "misc" if not self.venue or data else "article" if volume or self.venue in JOURNALS else "inproceedings"
        names = [name.removesuffix(" et al.") for name in self.authors]
        others = ["others"] if self.authors[-1].endswith(" et al.") else []
        fields = {"author": " and ".join(names + others), "title": f"{{{self.title}}}"}
        if volume:
            fields |= {name: value for name, value in volume.groupdict().items() if value}
        elif self.venue:
            fields["howpublished" if data else "journal" if kind == "article" else "booktitle"] = self.venue
        fields |= {"year": self.year, **_where(self.url)}
        lines = [f"  {name} = {{{_escaped(name, value)}}}," for name, value in fields.items()]
        return "\n".join([f"@{kind}{{{self.key},", *lines, "}"])


def _where(url: str) -> dict[str, str]:
    """Return the fields that say where a paper is."""
    if found := re.fullmatch(r"https://arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5})(?:v\d+)?", url):
        return {"eprint": found[1], "archivePrefix": "arXiv", "url": url}
    if found := re.fullmatch(r"https://doi\.org/(.+)", url):
        return {"doi": found[1], "url": url}
    return {"url": url}


def _escaped(field: str, text: str) -> str:
    return text if field in ("url", "doi", "eprint") else re.sub(r"([&%$#_])", r"\\\1", text)


def papers_in(text: str) -> list[Paper]:
    """Return the papers that a docstring names in full, in their order, each once."""
    found = [
        Paper(
            tuple(re.split(r", and |, | and ", match["authors"])),
            match["title"],
            (match["venue"] or "").strip(),
            match["year"],
            match["url"].rstrip("."),
        )
        for paragraph in text.split("\n\n")
        for match in _PAPER.finditer(" ".join(paragraph.split()))
    ]
    return list(dict.fromkeys(found))


def papers(kind: str, name: str) -> list[Paper]:
    """Return the papers of a method, its own first; [] where its file names none.

    Args:
        kind: A key of ``METHODS``.
        name: A registered name.
    """
    if kind == "strategy":
        return papers_in(STRATEGIES.get(name, ""))
    return papers_in(source_text(location(kind, name, kind).partition(":")[0]))


def source_text(module: str) -> str:
    """Return what a method's file says of its sources, without importing it (torch takes seconds)."""
    spec = importlib.util.find_spec(module)
    file = Path(str(spec.origin)) if spec is not None else None
    if file is None or not file.is_file():
        return ""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("Differs from the paper")[0]


def cite(names: list[str]) -> str:
    """Return the BibTeX entries of methods; ``fedbd`` is a name, too. Each paper stands there once.

    Raises:
        UserError: With all names that are neither.
    """
    problems: list[Problem] = []
    blocks: list[str] = []
    seen: set[str] = set()
    for name in dict.fromkeys(names):
        kinds = [kind for kind, methods in METHODS.items() if name in methods]
        if name == "fedbd":
            blocks.append(FEDBD)
        elif not kinds:
            known = [known for methods in METHODS.values() for known in methods] + ["fedbd"]
            remedy = near_miss(name, known) or "fedbd list names the methods"
            expected = "must be a method, a scenario file or a run's folder"
            problems.append(Problem(path="NAME", expected=expected, got=repr(name), remedy=remedy))
        for kind in kinds:
            found = papers(kind, name)
            title = f"% {name} ({kind})" if found else f"% {name} ({kind}): no paper stands behind it; cite fedbd"
            shown = [f"% {paper.key}, as above" if paper.key in seen else paper.bibtex() for paper in found]
            blocks.append("\n".join([title, *shown]))
            seen.update(paper.key for paper in found)
    if problems:
        raise UserError(problems)
    return "\n\n".join(blocks)
