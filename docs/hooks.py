"""Hooks of mkdocs: pages that stand elsewhere in the repository, and links that lead there."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # file in the repository -> page of the site
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "policies/README.md": "policies.md",
    "evals/README.md": "evaluations.md",
    "evals/results/families.md": "families.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and the images that pages show."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for image in sorted((ROOT / "evals" / "results").glob("*.png")):
        files.append(File.generated(config, f"images/{image.name}", abs_src_path=str(image)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links into the repository into links within the site; what the site does not have becomes plain text."""
    here = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def within_site(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups()
        path = normpath(f"{here.rpartition('/')[0]}/{target}").lstrip("/")
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif mark:
            path = path.replace("evals/results/", "images/")
        else:
            return f"{text} (`{path}`)" if path not in text else text
        return f"{mark}[{text}]({path}{anchor or ''})"

    return LINK.sub(within_site, markdown)
