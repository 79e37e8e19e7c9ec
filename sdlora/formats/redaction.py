"""What metadata says about a person, a computer and its folders is taken out, whichever program wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_FOLDER_KEYS = ("ss_dataset_dirs", "ss_tag_frequency", "ss_reg_dataset_dirs")
"""Objects whose keys are names of folders of images."""
_HOST_KEYS = re.compile(r"(?i)(^|[_.])(host(_?name)?|node_?name|computer_?name|machine(_?name)?|user_?name|login)$")
_SECRET_KEYS = re.compile(
    r"(?i)(^|[_.])(api_?key|(auth|access|hf|hub|huggingface|wandb|secret)?_?token|password|passwd|secret)$"
)
_SECRET = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|sk-[\w-]{8,}|gh[pousr]_\w{8,}|github_pat_\w{8,}|glpat-[\w-]{8,}|xox[abp]-[\w-]{8,}"
    r"|AKIA[A-Z0-9]{12,}|AIza[\w-]{20,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
_NAMED_SECRET = re.compile(
    r"(?i)(\b(?:api|access|secret|wandb_api|auth|private)[_-]?(?:key|token)|\b(?:hf_?)?token|\bpassword|\bpasswd|\bpwd|\bsecret)"
    r"(\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s&,;\"']{4,})"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{12,}")
_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
_MAIL = re.compile(
    r"(?:(?:\"[^\"<>]*\"|[^\W\d_][\w.'-]*(?:[ \t]+[^\W\d_][\w.'-]*){0,3})[ \t]*<\s*)?[\w.+-]+@[\w-]+(?:\.[\w-]+)+>?"
)
_FILE_ADDRESS = re.compile(r"(?i)\bfile:/{1,3}(?:[^\s\"'<>|,;]*[\\/])?([^\\/\s\"'<>|,;]*)")
_HOST = re.compile(
    r"(?i)\b(?:[a-z0-9][a-z0-9-]*\.)+(?:local|lan|internal|intranet|corp|localdomain|home|home\.arpa)\b(?::\d+)?"
    r"|\b(?:10|127|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2,3}(?::\d+)?\b|\b(?:DESKTOP|LAPTOP)-[A-Z0-9]{5,}\b"
)
_NAMED_HOST = re.compile(r"(?i)(\b(?:host(?:_?name)?|node_?name|computer_?name|user(?:_?name)?)\s*[=:]\s*)[\w.-]+")
_AT_HOST = re.compile(r"(?<![\w@])[a-z_][\w.-]*@[\w-]+:(?=[/~])")
_START = r"(?:[A-Za-z]:[\\/]|\\\\|~[\w.-]*[\\/]|[\\/])"
_WHOLE_PATH = re.compile(rf"\s*{_START}.*[^\s]", re.DOTALL)
_QUOTED_PATH = re.compile(rf"(?P<quote>[\"']){_START}[^\"'\n]*[\\/](?P<name>[^\"'\\/\n]*)(?P=quote)")
_PATH_WITHIN = re.compile(
    r"(?<![\w:/\\.])(?:[A-Za-z]:[\\/]|\\\\|~[\w.-]*[\\/]|/|(?:%\w+%|\$\{?\w+\}?)[\\/])"
    r"(?:[^\\/\s\"',;:<>|]+[\\/])+([^\\/\s\"',;:<>|]*)"
)
_HOME_FILE = re.compile(r"(?<![\w:/\\.])(?:~[\w.-]*|%\w+%|\$\{?\w+\}?)[\\/]([^\\/\s\"',;:<>|]+)")


def redacted(metadata: Mapping[str, str]) -> dict[str, str]:
    """The same metadata without folders, hosts, mail addresses, tokens and keys; also within JSON.

    Only the last name of a path stays. Names of folders of images become ``folder-1``, ``folder-2`` … by the order of their
    names, the same one everywhere.
    """
    folders = _folder_names(metadata)
    return {key: _value(key, value, folders) for key, value in metadata.items()}


def changed_keys(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[str, ...]:
    """The keys whose values differ, sorted."""
    return tuple(sorted(key for key in before if before[key] != after.get(key)))


def _folder_names(metadata: Mapping[str, str]) -> dict[str, str]:
    """Name of a folder of images -> what is written for it; ``folder-N`` stays."""
    names = {name for key in _FOLDER_KEYS for name in _keys_of(metadata.get(key, ""))}
    return {name: name if re.fullmatch(r"folder-\d+", name) else "" for name in names} | {
        name: f"folder-{number}"
        for number, name in enumerate(sorted(names), 1)
        if not all(re.fullmatch(r"folder-\d+", known) for known in names)
    }


def _keys_of(value: str) -> list[str]:
    tree = _parsed(value)
    return list(tree) if isinstance(tree, dict) else []


def _parsed(value: str) -> Any:
    if not value.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _value(key: str, value: str, folders: Mapping[str, str]) -> str:
    tree = _parsed(value)
    if tree is None:
        return _named(key, value)
    if key in _FOLDER_KEYS and isinstance(tree, dict):
        clean: Any = {folders[name]: _tree("", inner) for name, inner in tree.items()}
    else:
        clean = _tree(key, tree)
    return value if clean == tree else json.dumps(clean, ensure_ascii=False)


def _tree(key: str, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {_text(name): _tree(name, value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_tree(key, value) for value in tree]
    return _named(key, tree) if isinstance(tree, str) else tree


def _named(key: str, text: str) -> str:
    """``text`` as the value of ``key``, whose name may say that it is a secret or a host."""
    if (_SECRET_KEYS.search(key) or _HOST_KEYS.search(key)) and text not in ("", "None"):
        return ""
    return _text(text)


def _text(text: str) -> str:
    if text.startswith("data:"):
        return text
    text = _SECRET.sub("", _BEARER.sub(r"\1", _NAMED_SECRET.sub(r"\1\2", text)))
    text = _FILE_ADDRESS.sub(r"\1", _MAIL.sub("", _LOGIN.sub("", text)))
    text = _HOST.sub("", _NAMED_HOST.sub(r"\1", _AT_HOST.sub("", text)))
    if _WHOLE_PATH.fullmatch(text) and "\n" not in text:
        return re.split(r"[\\/]", text.rstrip().rstrip("\\/"))[-1]
    text = _QUOTED_PATH.sub(r"\g<quote>\g<name>\g<quote>", text)
    return _HOME_FILE.sub(r"\1", _PATH_WITHIN.sub(r"\1", text))
