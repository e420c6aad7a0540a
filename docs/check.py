"""
Check the links of README and documentation, then run their Python and Bash blocks and the examples that they include, each
file from top to bottom in a temporary folder.

A block below ``<!-- slow -->`` runs with ``--slow`` only, one below ``<!-- no-check -->`` never. Each Python block is a script
of its own. The package must be installed in the environment of the interpreter that runs this.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = r"```(python|bash|\{literalinclude\} (\S+\.py))\n(.*?)^```$"
BLOCK = re.compile(rf"^(?:<!-- (slow|no-check) -->\n+)?{FENCE}", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)")
# Folders that commands of the documentation name
LINKED = ("benchmarks", "examples", "zoo_configs")


def pages() -> list[Path]:
    """README, the pages of the documentation and what they include, without the reports and what Sphinx has built."""
    guide = sorted(page for folder in ("guide", "modules") for page in (ROOT / "docs" / folder).glob("*.md"))
    return [ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "sb3_deepcrl" / "agents" / "README.md", *guide]


def anchors(page: Path) -> set[str]:
    """What links to the headings of a page end with, as on GitHub and in MyST."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    """
    Find the links to files and headings of the repository that lead nowhere. Sphinx knows the pages of the documentation only.

    :param page: Markdown file
    :return: A line for each
    """
    dead = []
    for name, anchor in LINK.findall(page.read_text()):
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(f"{page.relative_to(ROOT)}: dead link {name}{'#' if anchor else ''}{anchor}")
    return dead


def run_block(language: str, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """
    Run one block as its reader would.

    :param language: "python" or "bash"
    :param code: What to run
    :param folder: Where to run it
    :return: Exit code and output
    """
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    env = {**os.environ, "PATH": path, "MPLBACKEND": "Agg"}
    if language == "python":
        # A file, because runs side by side import the main module
        script = folder / "block.py"
        script.write_text(code)
        command = [sys.executable, script.name]
    else:
        command = ["bash", "-euo", "pipefail", "-c", code]
    return subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def check(page: Path, slow: bool) -> bool:
    """
    Run the blocks of one page, up to the first one that fails.

    :param page: File with the blocks
    :param slow: Whether to run those that are marked as slow
    :return: Whether all went well
    """
    text = page.read_text()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for linked in LINKED:
            if (ROOT / linked).is_dir():
                (folder / linked).symlink_to(ROOT / linked)
        for block in BLOCK.finditer(text):
            mark, language, included, code = block.groups()
            if included:
                language, code = "python", (page.parent / included).read_text()
            line = text.count("\n", 0, block.start(2)) + 1
            print(f"{page.relative_to(ROOT)}:{line} ({included or language})", end=" ", flush=True)
            if mark == "no-check" or (mark == "slow" and not slow):
                print(f"left out: {mark}")
                continue
            print(f"\n{code}", end="", flush=True)
            start = time.perf_counter()
            result = run_block(language, code, folder)
            if result.returncode != 0:
                print(f"{result.stdout}\nFailed with exit code {result.returncode}.")
                return False
            print(f"-> {time.perf_counter() - start:.0f} s\n")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Check links, and run the code blocks of README and documentation")
    parser.add_argument("pages", nargs="*", type=Path, help="Markdown files (default: README and all pages)")
    parser.add_argument("--slow", action="store_true", help="Run the blocks that are marked as slow too")
    parser.add_argument("--links", action="store_true", help="Check the links only, of reports too")
    args = parser.parse_args()
    chosen = [page.resolve() for page in args.pages] or pages()
    linking = [*ROOT.glob("*.md"), *chosen, *(ROOT / "docs" / "results").glob("*.md")]
    if dead := [line for page in dict.fromkeys(linking) for line in dead_links(page)]:
        sys.exit("\n".join(dead))
    if not args.links:
        for page in chosen:
            if not check(page, args.slow):
                sys.exit(1)


if __name__ == "__main__":
    main()
