"""README, CONTRIBUTING and docs: every Python block runs unchanged, and every link leads to a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asyncembed.testing import EmbeddingServer

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "bench/README.md",
    ROOT / "examples/README.md",
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    text = page.read_text()
    if "ASYNCEMBED_TEST_DSN" in text:
        monkeypatch.setenv("ASYNCEMBED_TEST_DSN", request.getfixturevalue("dsn"))
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    with EmbeddingServer().in_thread() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        for block in BLOCK.finditer(text):
            lines_before = text[: block.start(1)].count("\n")  # so that a traceback has the line number of the page
            exec(compile("\n" * lines_before + block[1], str(page), "exec"), namespace)


def test_code_comes_before_line_25_of_the_readme() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("```python") < 24


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_existing_files(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_contributing_lists_every_package_and_flat_module() -> None:
    listed = re.findall(r"^  (\w+)(?:/|\.py)  ", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    paths = [path for path in (ROOT / "asyncembed").iterdir() if path.is_dir() or path.suffix == ".py"]
    assert sorted(listed) == sorted(path.stem for path in paths if not path.stem.startswith("__"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_sections_name_a_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
        text = ((page.parent / target) if target else page).read_text()
        titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}  # as GitHub makes them
        assert anchor in slugs, f"{target}#{anchor}"
