"""What the host of the repository reads: workflows call what exists, files have valid forms, a release has its notes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_nc

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
FORMS = sorted(set(GITHUB.glob("ISSUE_TEMPLATE/*.yml")) - {GITHUB / "ISSUE_TEMPLATE/config.yml"})
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
VERSION = lightning_nc.__version__.removesuffix(".dev0")  # the one that is released next

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="the source distribution has no .github")


def jobs():
    """Every job of every workflow, by file and name."""
    for file in WORKFLOWS:
        for name, job in yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"].items():
            yield f"{file.name}: {name}", job


def commands():
    """What the workflows run, with the entries of a matrix inserted."""
    for _, job in jobs():
        yield from (step["run"] for step in job.get("steps", ()) if "run" in step)
        yield from (
            row["command"] for row in job.get("strategy", {}).get("matrix", {}).get("include", ()) if "command" in row
        )


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", WORKFLOWS),
        ("custom.github-workflows-require-timeout", WORKFLOWS),
        ("vendor.dependabot", [GITHUB / "dependabot.yml"]),
        ("vendor.github-issue-forms", FORMS),
        ("vendor.github-issue-config", [GITHUB / "ISSUE_TEMPLATE/config.yml"]),
        ("vendor.readthedocs", [ROOT / ".readthedocs.yaml"]),
        ("vendor.citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_a_file_for_the_host_has_the_form_of_its_schema(schema, files):
    check = pytest.importorskip("check_jsonschema")
    with pytest.raises(SystemExit) as end:
        check.main(["--builtin-schema", schema, *map(str, files)])
    assert end.value.code == 0


def test_the_workflows_run_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    run = {target for command in commands() for target in re.findall(r"\bmake ([\w-]+)", command)}
    assert {"lint", "types", "test", "test-all", "test-oldest", "docs", "package"} <= run
    rules = re.findall(r"^([\w -]+):(?!=)", makefile, re.MULTILINE)
    assert run <= {target for rule in rules for target in rule.split()}


def test_jobs_read_alone_except_for_publishing_and_reporting():
    writes = {name: job["permissions"] for name, job in jobs() if "permissions" in job}
    assert writes == {
        "nightly.yml: report": {"issues": "write"},
        "release.yml: pypi": {"id-token": "write"},
        "release.yml: testpypi": {"id-token": "write"},
        "release.yml: github": {"contents": "write"},
    }
    for file in WORKFLOWS:
        assert yaml.safe_load(file.read_text(encoding="utf-8"))["permissions"] == {"contents": "read"}, file.name


def test_no_workflow_inserts_what_a_stranger_wrote_into_a_command():
    inserted = {name for command in commands() for name in re.findall(r"\$\{\{\s*(.+?)\s*\}\}", command)}
    assert inserted == {"matrix.command"}  # a branch's or an issue's name in a command would be run


def test_every_job_has_to_pass_before_a_change_is_said_to_pass():
    names = [name.partition(": ")[2] for name, _ in jobs() if name.startswith("ci.yml")]
    passed = dict(jobs())["ci.yml: passed"]
    assert sorted([*passed["needs"], "passed"]) == sorted(names)


def test_the_version_of_the_code_has_a_part_of_the_changelog_and_is_the_version_to_cite():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == lightning_nc.__version__
    first = re.search(r"^## (\S+) - (unreleased|\d{4}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE)
    assert first is not None
    assert first[1] == VERSION


@pytest.fixture
def release(tmp_path):
    """Runs .ci/release_notes.py for a tag, with a changelog; returns the status, the output and the error."""
    for name in (".ci", "lightning_nc"):
        (tmp_path / name).mkdir()
    (tmp_path / ".ci/release_notes.py").write_bytes((ROOT / ".ci/release_notes.py").read_bytes())

    def call(tag, changelog, version=VERSION, **environment):
        (tmp_path / "lightning_nc/__init__.py").write_text(f'__version__ = "{version}"\n', encoding="utf-8")
        (tmp_path / "CHANGELOG.md").write_text(changelog, encoding="utf-8")
        command = [sys.executable, tmp_path / ".ci/release_notes.py", tag]
        alone = {name: value for name, value in os.environ.items() if name != "GITHUB_REPOSITORY"}
        finished = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", env={**alone, **environment}
        )
        return finished.returncode, finished.stdout, finished.stderr

    return call


def test_a_release_shows_the_part_of_its_version_alone(release):
    changelog = (
        f"# Changelog\n\n## {VERSION} - 2026-01-31\n\nIn short.\n\n### Added\n\n- A\n\n## 0.0.9 - 2025-01-01\n\n- B\n"
    )
    assert release(f"v{VERSION}", changelog) == (0, "In short.\n\n### Added\n\n- A\n", "")
    dated = CHANGELOG.replace(f"## {VERSION} - unreleased", f"## {VERSION} - 2026-01-31")
    status, notes, _ = release(f"v{VERSION}", dated)
    assert status == 0
    assert "### Added" in notes


def test_links_to_files_of_the_repository_work_on_the_page_of_a_release(release):
    changelog = f"# Changelog\n\n## {VERSION} - 2026-01-31\n\n- [A](docs/a.md#b) and [C](https://c.org)\n"
    address = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "me/nc"}
    assert release(f"v{VERSION}", changelog, **address)[1] == (
        f"- [A](https://github.com/me/nc/blob/v{VERSION}/docs/a.md#b) and [C](https://c.org)\n"
    )


def test_a_development_version_is_not_released(release):
    changelog = "# Changelog\n\n## 0.2.0.dev0 - 2026-01-31\n\n- A\n"
    status, notes, error = release("v0.2.0.dev0", changelog, version="0.2.0.dev0")
    assert (status, notes) == (1, "")
    assert "0.2.0.dev0 is a development version" in error


@pytest.mark.parametrize(
    ("tag", "changelog", "needs"),
    [
        ("v9.9.9", "## {0} - 2026-01-31\n\n- A\n", "the tag must be v{0}"),
        ("{0}", "## {0} - 2026-01-31\n\n- A\n", "the tag must be v{0}"),
        ("v{0}", "## {0} - unreleased\n\n- A\n", "and the date, such as 2026-01-31; got 'unreleased'"),
        ("v{0}", "## 0.0.9 - 2026-01-31\n\n- A\n", "needs a part that begins with '## {0} - '"),
        ("v{0}", "## {0} - 2026-01-31\n\n## 0.0.9 - 2025-01-31\n\n- A\n", "needs a part"),
    ],
)
def test_a_release_is_refused_if_its_tag_date_or_notes_are_wrong(release, tag, changelog, needs):
    status, notes, error = release(tag.format(VERSION), "# Changelog\n\n" + changelog.format(VERSION))
    assert (status, notes) == (1, "")
    assert needs.format(VERSION) in error
