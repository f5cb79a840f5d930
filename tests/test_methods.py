"""Every method of every host: what docs/methods.md says of it is what happens."""

import methods_lightly
import methods_table
import pytest

needs_lightly = pytest.mark.skipif(not methods_lightly.ROOT, reason="LIGHTLY_ROOT names no clone of lightly")


@needs_lightly
@pytest.mark.parametrize("file", methods_lightly.files())
def test_example_file_of_lightly_trains_rightly_or_is_refused(file):
    """It trains as without LoGo when LoGo's weights are zero, and rightly with its defaults; or our error stops it."""
    assert not methods_lightly.examine(file).problems


@needs_lightly
def test_what_works_in_lightly():
    """The methods of two views that lightly has; whatever else there is can be refused only."""
    works = [
        "BYOL",
        "MoCo",
        "SimSiam",
        "SimCLR",
        "DCL",
        "DCLW",
        "FDA",
        "Barlow Twins",
        "VICReg",
        "NNCLR",
        "FastSiam",
        "TiCo",
    ]
    for host in methods_lightly.HOSTS.values():
        rows = [row for row in methods_lightly.rows() if row[0] == host]
        assert {method for _, method, verdict, _ in rows if verdict.startswith("works")} == set(works)


@pytest.mark.parametrize("source", methods_table.SOURCES)
def test_page_is_what_the_runs_say(source):
    if source not in methods_table.here():
        pytest.skip(f"the host of {source} is not here")
    committed = methods_table.sections(methods_table.PAGE.read_text())
    for host, section in methods_table.fresh(source).items():
        assert committed.get(host) == section, f"docs/methods.md is stale: {methods_table.COMMAND}"


def test_introduction_is_the_script_s():
    text = methods_table.PAGE.read_text()
    assert text == methods_table.page(methods_table.sections(text)), (
        f"docs/methods.md is stale: {methods_table.COMMAND}"
    )
