"""Source files as documents, for Stack-Edu: which language a file is in, and its text.

The languages are the 15 of Stack-Edu (the largest of StarCoder2Data), by the endings that GitHub's linguist gives them.
Where an ending is shared (.h, .sql dialects) the first language of the table has it.
"""

from __future__ import annotations

from pathlib import Path

ENDINGS = {
    "Python": (".py", ".pyi"),
    "C++": (".cpp", ".cc", ".cxx", ".hpp", ".hh", ".hxx"),
    "Markdown": (".md", ".markdown"),
    "C": (".c", ".h"),
    "JavaScript": (".js", ".mjs", ".cjs", ".jsx"),
    "Java": (".java",),
    "SQL": (".sql",),
    "PHP": (".php",),
    "C#": (".cs",),
    "TypeScript": (".ts", ".tsx"),
    "Shell": (".sh", ".bash", ".zsh"),
    "Swift": (".swift",),
    "Go": (".go",),
    "Rust": (".rs",),
    "Ruby": (".rb",),
}
_LANGUAGE = {ending: language for language, endings in ENDINGS.items() for ending in endings}
LONGEST_BYTES = 1 << 20  # of a source file; longer ones are data, or made by programs


def language_of(path: str) -> str | None:
    """None for files of no language in the table."""
    return _LANGUAGE.get(Path(path).suffix.lower())


def source_text(path: str) -> tuple[str | None, str]:
    """(text, "") or (None, why it is left out)."""
    content = Path(path).read_bytes()
    if len(content) > LONGEST_BYTES:
        return None, "file_too_long"
    if not content.strip():
        return None, "empty"
    try:
        return content.decode(), ""
    except UnicodeDecodeError:
        return None, "not_utf8"
