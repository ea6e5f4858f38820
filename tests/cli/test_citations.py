from __future__ import annotations

import re

import pytest

from fedbd.cli.citations import Paper, cite, papers, papers_in, source_text
from fedbd.errors import UserError
from fedbd.registry import METHODS, location

EVERY = [(kind, name) for kind, names in METHODS.items() for name in names]
OF_PAPERS = ("trigger", "attack", "evasion", "local_defense", "secure_sum", "aggregation", "cleanup", "detection")


def entries(text: str) -> dict[str, dict[str, str]]:
    """Read BibTeX back: key -> fields, by counting braces."""
    found: dict[str, dict[str, str]] = {}
    for block in re.findall(r"^@\w+\{.*?^\}", text, re.DOTALL | re.MULTILINE):
        assert block.count("{") == block.count("}"), block
        head = re.match(r"@(\w+)\{([a-z0-9]+),\n", block)
        assert head is not None, block
        fields = dict(re.findall(r"^  (\w+) = \{(.*)\},$", block, re.MULTILINE))
        found[head[2]] = {"kind": head[1], **fields}
    return found


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_method_has_an_entry_or_says_that_no_paper_stands_behind_it(kind: str, name: str) -> None:
    text = cite([name])
    found = papers(kind, name)
    assert f"% {name} ({kind})" in text
    assert len(entries(text)) >= len({paper.key for paper in found})
    assert found or f"% {name} ({kind}): no paper stands behind it; cite fedbd" in text
    for paper in found:
        assert re.fullmatch(r"(19|20)\d\d", paper.year)
        assert paper.url.startswith("https://")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in EVERY if kind != "strategy"])
def test_every_paper_that_a_file_names_in_full_is_read(kind: str, name: str) -> None:
    """A quoted title between an author's comma and a year is a paper; whoever writes one otherwise sees it here."""
    text = " ".join(source_text(location(kind, name, kind).partition(":")[0]).split())
    titles = re.findall(r'[\w.], "([^"]+?),?",?[^"]{0,60}?(?:19|20)\d\d[^"]{0,4}https://', text)
    assert [paper.title for paper in papers(kind, name)] == list(dict.fromkeys(titles))
    heads = [re.split(r', "' + re.escape(title), text)[0] for title in titles]
    for paper, head in zip(papers(kind, name), heads, strict=True):
        before = head[: head.rindex(paper.authors[0])].rstrip()
        assert before == "" or before[-1] in ".:;(" or before.split()[-1].islower(), before[-40:]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in EVERY if kind in OF_PAPERS])
def test_attacks_and_defenses_have_papers(kind: str, name: str) -> None:
    assert papers(kind, name) != []


def test_one_entry_by_hand() -> None:
    assert cite(["strip"]) == (
        "% strip (detection)\n"
        "@inproceedings{gao2019strip,\n"
        "  author = {Y. Gao and C. Xu and D. Wang and S. Chen and D. C. Ranasinghe and S. Nepal},\n"
        "  title = {{STRIP: A Defence Against Trojan Attacks on Deep Neural Networks}},\n"
        "  booktitle = {ACSAC},\n"
        "  year = {2019},\n"
        "  eprint = {1902.06531},\n"
        "  archivePrefix = {arXiv},\n"
        "  url = {https://arxiv.org/abs/1902.06531},\n"
        "}"
    )


def test_names_venues_and_addresses_of_many_forms() -> None:
    text = """What it does, with A. Colon: in its first line.

    Of L. van der Maaten, P.-Y. Chen, and J. Konečný, "A Study of 100 % & More", IEEE S&P 2020,
    https://doi.org/10.1000/x_1; code https://github.com/a/b. As by Xie et al., "Two", 2021 (https://openreview.net/f?id=1).
    And T. Zhang, "Three", IEEE TDSC 2022, https://arxiv.org/abs/2006.14871v2, section 4; Y. LeCun, "Four", Proc. IEEE
    86(11), 1998 (https://doi.org/10.1109/5.726791).
    """
    found = papers_in(text)
    assert found == [
        Paper(
            ("L. van der Maaten", "P.-Y. Chen", "J. Konečný"),
            "A Study of 100 % & More",
            "IEEE S&P",
            "2020",
            "https://doi.org/10.1000/x_1",
        ),
        Paper(("Xie et al.",), "Two", "", "2021", "https://openreview.net/f?id=1"),
        Paper(("T. Zhang",), "Three", "IEEE TDSC", "2022", "https://arxiv.org/abs/2006.14871v2"),
        Paper(("Y. LeCun",), "Four", "Proc. IEEE 86(11)", "1998", "https://doi.org/10.1109/5.726791"),
    ]
    first, second, third, fourth = (paper.bibtex() for paper in found)
    assert "title = {{A Study of 100 \\% \\& More}}" in first
    assert "doi = {10.1000/x_1}" in first
    assert second.startswith("@misc{xie2021two,")
    assert "author = {Xie and others}" in second
    assert third.startswith("@article{")
    assert "eprint = {2006.14871}" in third
    assert "  journal = {Proc. IEEE},\n  volume = {86},\n  number = {11},\n  year = {1998},\n" in fourth


def test_a_paper_of_two_methods_stands_there_once() -> None:
    text = cite(["kernel_density", "lid", "fedbd"])
    assert text.count("@article{jin2022mitigate") == 1
    assert "% jin2022mitigate, as above" in text
    assert entries(text)["fedbd"]["title"] == "{fedbd: a federated-learning security simulator}"


def test_a_triggers_paper_is_cited_under_the_triggers_name() -> None:
    assert [paper.key for paper in papers("attack", "badnets")] == ["gu2017badnets", "bagdasaryan2018backdoor"]
    assert "nguyen2021wanet" in [paper.key for paper in papers("trigger", "wanet")]
    assert "barni2019backdoor" in [paper.key for paper in papers("trigger", "sig")]


def test_every_unknown_name_is_told() -> None:
    with pytest.raises(UserError) as refused:
        cite(["rnp", "stirp", "nothing at all"])
    assert str(refused.value).splitlines() == [
        "NAME: must be a method, a scenario file or a run's folder, got 'stirp'; did you mean 'strip'?",
        "NAME: must be a method, a scenario file or a run's folder, got 'nothing at all'; fedbd list names the methods",
    ]
