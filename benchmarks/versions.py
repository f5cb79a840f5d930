"""The tests of the core with the oldest libraries that setup.cfg allows, and with the newest that there are.

    python benchmarks/versions.py oldest newest     # or one of them; a torch environment takes 6 GB until it is done

Each set gets an environment of its own, made by uv in a temporary folder and deleted afterwards: "oldest" is what
`uv pip install --resolution lowest-direct` makes of setup.cfg's floors, on the oldest Python allowed; "newest" is what
pip would install. Prints one row of a table for each; exit status 1 if a test failed.
"""

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETS = {"oldest": ("3.10", "lowest-direct"), "newest": ("3.13", "highest")}
# What the tests themselves need; floors, since the lowest of all would be versions of another age.
TOOLS = ["pytest>=8", "hypothesis>=6.100", "scikit-image>=0.24", "hydra-core>=1.3"]
TESTS = ("losses", "affinity", "similarities", "overlap", "diagnostics", "augment", "crops", "properties", "learner")
HOSTS = ("wrapping", "lightly", "own_models", "default")
SHOWN = ("torch", "torchvision", "numpy", "lightly", "pytorch_lightning", "timm")


def run(*command, **options):
    return subprocess.run([str(part) for part in command], cwd=ROOT, check=True, **options)


def try_set(name, python, tests, folder):
    version, resolution = SETS[name]
    uv = [sys.executable, "-m", "uv"]
    environment = Path(folder) / name
    run(*uv, "venv", "--quiet", "--python", python or version, environment)
    bin_python = environment / "bin" / "python"
    install = ["pip", "install", "--quiet", "--python", bin_python, "--resolution", resolution]
    run(*uv, *install, f"{ROOT}[lightly,timm]", *TOOLS)
    listing = run(bin_python, "-c", _LIST, *SHOWN, capture_output=True, text=True).stdout.split()
    report = Path(folder) / f"{name}.txt"
    files = [ROOT / f"tests/test_{test}.py" for test in tests]
    quiet = [f"-Wdefault::{kind}Warning" for kind in ("Future", "Deprecation")]  # of libraries of another age
    quiet.append("-Wdefault:Guards may run slower on Python")  # torch.compile on 3.13.0
    command = [bin_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *quiet, *files]
    small = {"OMP_NUM_THREADS": "1", "HYPOTHESIS_EXAMPLES": "200"} | os.environ
    with report.open("w") as out:
        code = subprocess.run([str(part) for part in command], cwd=ROOT, env=small, stdout=out, stderr=out).returncode
    lines = report.read_text().splitlines()
    if code:
        print("\n".join(lines[-60:]))
    return code, [name, *listing, lines[-1].strip("= ") if lines else f"exit status {code}"]


_LIST = """
import importlib.metadata as m, platform, sys
print(platform.python_version(), *(m.version(name) for name in sys.argv[1:]))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="+", choices=SETS)
    parser.add_argument("--python", help="another interpreter than the set's: a version or a path")
    parser.add_argument("--hosts", action="store_true", help="the tests with lightly's models too")
    arguments = parser.parse_args()
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "uv"], check=True)
    rows, codes = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["UV_CACHE_DIR"] = f"{folder}/cache"
        for name in arguments.sets:
            code, row = try_set(name, arguments.python, TESTS + HOSTS * arguments.hosts, folder)
            codes.append(code)
            rows.append(row)
    head = ["set", "Python", *SHOWN, f"tests on {datetime.date.today()}"]
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
