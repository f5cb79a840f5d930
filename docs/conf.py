"""Sphinx settings; `make docs` builds the site into build/docs, and a warning fails it."""

import shutil
from importlib import metadata
from pathlib import Path

import logo_plugin

project = "logo-plugin"
release = logo_plugin.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
html_theme = "furo"
html_title = f"logo-plugin {release}"
html_favicon = "static/favicon.svg"
_repository = metadata.metadata("logo-plugin")["Home-page"]  # set in setup.cfg
html_theme_options = {"footer_icons": [{"name": "Repository", "url": _repository, "html": "Repository", "class": ""}]}
html_show_copyright = False
html_show_sphinx = False
html_static_path = ["static"]
html_css_files = ["site.css"]
templates_path = ["templates"]

myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are committed with their outputs
# They are pages of the site, too. Not a link in the repository: it would pack them into the sdist a second time.
_docs = Path(__file__).parent
shutil.rmtree(_docs / "notebooks", ignore_errors=True)
shutil.copytree(_docs.parent / "examples" / "notebooks", _docs / "notebooks")

default_role = "code"  # docstrings write `name`
autodoc_member_order = "bysource"  # for a module: the order of its __all__
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
# Without intersphinx, so that the site builds offline: names of other libraries are not links. Nor are type variables
# (T), and what the affinity makes of its pairs.
nitpick_ignore_regex = [(r"py:.*", r"(?!logo_plugin).*|logo_plugin\.\w+\.T|logo_plugin\.pairs\.Pairs")]


def _skip_field_numbers(app, what, name, obj, skip, options):
    """A NamedTuple's fields are in its signature; Python's own text on them says nothing more."""
    return True if str(obj.__doc__).startswith("Alias for field number") else None


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", _skip_field_numbers)
