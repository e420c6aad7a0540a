"""Configuration of Sphinx, see https://www.sphinx-doc.org/en/master/usage/configuration.html"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "sb3_deepcrl"
copyright = "the sb3_deepcrl contributors"
author = "the sb3_deepcrl contributors"
release = version = (ROOT / "sb3_deepcrl" / "version.txt").read_text().strip()

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence"]
# Links to headings, `page.md#heading`: one that leads nowhere is a warning, and with -W an error
myst_heading_anchors = 4

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"

html_theme = "sphinx_rtd_theme"
html_title = f"sb3_deepcrl {release}"
html_show_copyright = False
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True
html_static_path = ["_static"]
html_css_files = ["tables.css"]
