"""The README is short, its numbers are the measured ones, and what the project links is there."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
URLS = PYPROJECT["project"]["urls"]
LINK = re.compile(r"\]\(([^)]+)\)")


def words(page: str) -> int:
    """The words of a page as it is shown, code included."""
    shown = re.sub(r"\]\([^)]*\)", "]", page)
    shown = re.sub(r"<!--.*?-->", "", shown, flags=re.DOTALL)
    shown = re.sub(r"^(```.*|\|[-:| ]+\|)$", "", shown, flags=re.MULTILINE)
    return len(shown.replace("|", " ").split())


def test_the_readme_can_be_read_at_once() -> None:
    assert words(README) <= 1500


def test_the_complete_example_stands_on_the_first_screen() -> None:
    """Its two files are the first two Python blocks, and nothing long comes before them."""
    fences = [n for n, line in enumerate(README.splitlines()) if line.startswith("```")]
    assert README.splitlines()[fences[4] + 1] == "# main.py"
    assert fences[5] <= 65


# -- the measured table ------------------------------------------------------------------------

OURS = "**asgi-db**"
BY_HAND = "plain `Depends`"
RIVALS = 7


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def number(cell: str) -> int:
    return int(cell.replace(",", "").removesuffix("/s"))


def measured(scenario: str, of: str) -> list[int]:
    """What the table of `make chaos` says of each contender on PostgreSQL, ours first.

    Args:
        scenario: the rows.
        of: "lost", "leaked", "failed", or what stands under "besides" before a number.
    """
    found = dict[str, int]()
    for line in (ROOT / "docs" / "reliability.md").read_text().splitlines():
        row = cells(line)
        if len(row) == 8 and row[0] == scenario and row[2] == "PostgreSQL":
            tries, survived, lost, leaked = map(int, row[3:7])
            besides = re.search(rf"{of}: (\d+)", row[7])
            values = {"lost": lost, "leaked": leaked, "failed": tries - survived}
            found[row[1]] = values[of] if of in values else int(besides[1]) if besides else 0
    return in_order(found)


def reads_per_second() -> list[int]:
    """What the table of `make bench` says of a read on PostgreSQL that is 1 ms away."""
    page = (ROOT / "docs" / "performance.md").read_text()
    table = page.partition("### A read with the database 1 ms away")[2].partition("| MariaDB")[0]
    found = dict[str, int]()
    for line in table.splitlines():
        row = cells(line)
        if len(row) == 4 and row[1].endswith("/s"):
            found[row[0].removesuffix(" †")] = number(row[1])
    del found["`Depends(get_db)`, pre-ping"], found["asyncpg by hand"]
    return in_order(found)


def in_order(found: dict[str, int]) -> list[int]:
    ours, by_hand = found.pop(OURS), found.pop(BY_HAND)
    assert len(found) == RIVALS
    return [ours, by_hand, *found.values()]


@pytest.mark.parametrize(
    ("row", "values"),
    list(
        enumerate(
            [
                measured("read your writes", "reads that came too early"),
                measured("restart", "lost"),
                measured("frozen", "lost"),
                measured("network", "lost"),
                measured("cancellation", "lost"),
                measured("cancellation", "leaked"),
                measured("overload", "failed"),
                measured("slow readers", "failed"),
                measured("websockets", "sockets without an answer"),
                reads_per_second(),
            ]
        )
    ),
)
def test_each_row_of_the_readmes_table_is_what_was_measured(row: int, values: list[int]) -> None:
    table = README.partition("<!-- measured: begin -->")[2].partition("<!-- measured: end -->")[0]
    rows = [cells(line) for line in table.strip().splitlines()[2:]]
    assert len(rows) == 10
    _, ours, by_hand, rivals = rows[row]
    least, most = map(number, rivals.split(" to "))
    assert [number(ours), number(by_hand), least, most] == [
        values[0],
        values[1],
        min(values[2:]),
        max(values[2:]),
    ]


# -- links and commands ------------------------------------------------------------------------


def headings(page: str) -> set[str]:
    """The anchors of a page."""
    without_code = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#+ (.*)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def leads_somewhere(address: str) -> bool:
    """Whether an address in the repository or on the site names a file, and a heading in it."""
    place, _, anchor = address.partition("#")
    if place.startswith(URLS["Documentation"]):
        page = place.removeprefix(URLS["Documentation"]).removesuffix(".html") + ".md"
        text = (ROOT / "docs" / page).read_text()
        return not anchor or anchor in headings(text)
    path = re.sub(r"^/?((tree|blob)/main/)?", "", place.removeprefix(URLS["Source"]))
    return path in SERVICES or (ROOT / path).exists()


SERVICES = {"discussions", "issues", "security/advisories/new"}
"""What the host of the repository has beside its files."""


def test_every_link_of_the_readme_is_absolute() -> None:
    """It is the page of the package too, where nothing lies beside it."""
    links = LINK.findall(README)
    assert links
    assert all(link.startswith((URLS["Documentation"], URLS["Source"])) for link in links)


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "SECURITY.md",
        "pyproject.toml",
        *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(".github/**/*.*"))),
    ],
)
def test_every_address_of_the_project_leads_somewhere(name: str) -> None:
    for address in re.findall(r"https://[^\s)>\"'#]+(?:#[\w-]+)?", (ROOT / name).read_text()):
        if "asgi-db" in address and not address == URLS["Documentation"]:
            assert leads_somewhere(address), address


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CODE_OF_CONDUCT.md"])
def test_every_link_inside_the_repository_leads_somewhere(name: str) -> None:
    for link in LINK.findall((ROOT / name).read_text()):
        assert link.startswith("https://") or (ROOT / link).exists(), link


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "RELEASING.md"])
def test_every_make_target_that_is_named_exists(name: str) -> None:
    page, makefile = (ROOT / name).read_text(), (ROOT / "Makefile").read_text()
    targets = re.findall(r"`make ([\w-]+)", page)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_the_readme_names_the_command_that_ci_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert "`make test`" in README and re.search(r"^make test$", ci, re.MULTILINE)


def test_the_hooks_use_the_ruff_of_make_check() -> None:
    groups = PYPROJECT["dependency-groups"]
    (ruff,) = [one for one in groups["check"] if one.startswith("ruff")]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r'additional_dependencies: \["(.*)"\]', hooks)) == {ruff}


def test_the_version_of_the_package_has_its_section_in_the_changelog() -> None:
    changelog, version = (ROOT / "CHANGELOG.md").read_text(), PYPROJECT["project"]["version"]
    unreleased, newest = re.findall(r"^## \[(.*?)\]", changelog, re.MULTILINE)[:2]
    assert (unreleased, newest) == ("Unreleased", version)
    assert f"[{version}]: {URLS['Source']}/releases/tag/v{version}\n" in changelog
    assert f"[Unreleased]: {URLS['Source']}/compare/v{version}...HEAD\n" in changelog
