"""What the README says is run here, word for word."""

import re
import subprocess

import pytest


@pytest.fixture(scope="module")
def readme(root) -> str:
    return (root / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def section(text: str, title: str) -> str:
    return re.split(r"^## ", text.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def test_quickstart_is_two_commands(readme):
    commands = blocks(section(readme, "Quickstart"), "sh")
    assert [len(command.splitlines()) for command in commands] == [1, 1]
    assert commands[0].rstrip().endswith("python examples/quickstart.py")
    assert commands[1].rstrip().endswith("python -m pytest")
    for command in commands:
        subprocess.run(["sh", "-n", "-c", command], check=True)


def test_programs(readme, root, tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(root / "examples")
    monkeypatch.chdir(tmp_path)
    programs = blocks(readme, "python")
    assert programs
    names = {"__name__": "__main__"}
    for program in programs:
        exec(compile(program, "README.md", "exec"), names)
    assert "ROMEO:" in capsys.readouterr().out
    assert (tmp_path / "my-model" / "config.json").is_file()


def test_links_lead_somewhere(readme, root):
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", readme)
    assert links
    assert not [link for link in links if not (root / link).exists()]


def test_every_family_is_in_the_table(readme):
    import eqx_moe

    listed = re.findall(r"^\| `(\w+)` \|", section(readme, "Supported families"), flags=re.MULTILINE)
    assert listed == list(eqx_moe.families())
