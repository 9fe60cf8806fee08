"""Reading YAML in which every value knows where it was written.

Scalars follow YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema), as editors do: ``1e-4`` is a
number, ``no`` and ``on`` are text. Anchors, aliases, merge keys and tags are refused: a job says everything once, in
plain sight.
"""

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from yaml.error import Mark, MarkedYAMLError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from .errors import JobError

FieldPath = tuple[str | int, ...]
"""Where a value stands in a job: ``("validation", "prompts", 0, "seconds")``."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a job.

    Attributes:
        path: of the field.
        message: what is wrong, and what to write instead.
        at_key: point at the key rather than at its value.
        mark: point here, wherever ``path`` was written.
    """

    path: FieldPath
    message: str
    at_key: bool = False
    mark: Mark | None = None


@dataclass
class Document:
    """A YAML file as plain values.

    Attributes:
        name: the file, as the user named it.
        data: mappings, lists and scalars.
        faults: what could not be read.
        marks: where the key and the value of each path were written.
    """

    name: str
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    faults: list[Fault] = field(default_factory=list[Fault])
    marks: dict[FieldPath, tuple[Mark, Mark]] = field(default_factory=dict[FieldPath, tuple[Mark, Mark]])

    def report(self, faults: Collection[Fault]) -> str:
        """All faults in the order of the file, one a line: ``file:line:column: path: message``."""
        return "\n".join(line for _, line in sorted(map(self._line, faults), key=lambda each: each[0]))

    def _line(self, fault: Fault) -> tuple[tuple[bool, int, int], str]:
        text = f"{dotted(fault.path)}: {fault.message}" if fault.path else fault.message
        mark = fault.mark or self._mark(fault)
        if mark is None:
            return (False, 0, 0), f"{self.name}:1:1: {text}"
        return (mark.name != self.name, mark.line, mark.column), f"{spot(mark)}: {text}"

    def _mark(self, fault: Fault) -> Mark | None:
        path = fault.path
        while path and path not in self.marks:
            path = path[:-1]
        at_key = fault.at_key or path != fault.path
        return self.marks[path][0 if at_key else 1] if path else None


def dotted(path: FieldPath) -> str:
    """``validation.prompts.0.seconds``: how paths are shown, and written in ``--set``."""
    return ".".join(map(str, path))


def overlap(one: FieldPath, other: FieldPath) -> bool:
    """Whether one of the paths leads through the other."""
    return all(a == b for a, b in zip(one, other, strict=False))


def spot(mark: Mark) -> str:
    """``file:line:column``, or the override as it was written."""
    return mark.name if mark.name.startswith("--set ") else f"{mark.name}:{mark.line + 1}:{mark.column + 1}"


def read(path: Path, overrides: Sequence[str] = (), references: Collection[FieldPath] = ()) -> Document:
    """Read a YAML file.

    Args:
        path: of the file.
        overrides: ``path=value``, applied in order; the value is YAML.
        references: fields whose ``${env:NAME}`` stays as it is (secrets).

    Raises:
        JobError: if the file cannot be read, is not YAML or not a mapping, or an override leads nowhere.
    """
    name = str(path)
    try:
        root = _compose(_text(path), name)
        if root is None or (isinstance(root, ScalarNode) and not root.value):
            raise JobError(f"{name}:1:1: the file is empty", "start from jobs/demo.yaml")
        if not isinstance(root, MappingNode):
            raise JobError(f"{spot(root.start_mark)}: a job is a mapping (key: value)", "start from jobs/demo.yaml")
        for override in overrides:
            _override(root, override)
        reader = _Reader(Document(name), references)
        reader.document.data = reader.plain(root, ())
        return reader.document
    except RecursionError:
        raise JobError(f"{name}: lists and mappings are nested too deeply", "a job needs a handful of levels") from None


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise JobError(f"{path}: there is no such file", "name a job file, for example jobs/demo.yaml") from None
    except UnicodeDecodeError as error:
        raise JobError(f"{path}: the file is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}", "name a YAML file that you may read") from None


def _compose(text: str, name: str) -> Node | None:
    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_node()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = spot(mark) if mark else name
        raise JobError(f"{place}: {error.problem or error.context}", _syntax_cure(text, mark)) from None
    except yaml.YAMLError as error:
        raise JobError(f"{name}: not YAML: {str(error).splitlines()[0]}", "save it as plain UTF-8 text") from None


def _syntax_cure(text: str, mark: Mark | None) -> str:
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    if re.search(r"[{\[,].*\$\{", line):
        return 'inside {…} and […], ${env:NAME} needs quotes: "${env:NAME}"'
    if "\t" in line:
        return "indent with spaces, not with tabs"
    if "[" in line and re.search(r"\w: [^\"']*\[", line):
        return 'text that contains [ ] { } : or # needs quotes: "[verse] さくら"'
    return "look at this line and the one above: indentation, brackets and quotes must match; put odd text in quotes"


_TAG = "tag:yaml.org,2002:"


def _core_schema() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    digits = "0123456789"
    kinds = (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
        ("int", r"[-+]?(0|[1-9][0-9]{0,17})", [*"-+", *digits]),
        ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.", *digits]),
    )
    resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for kind, pattern, firsts in kinds:
        for first in firsts:
            resolvers.setdefault(first, []).append((_TAG + kind, re.compile(f"(?:{pattern})$")))
    return resolvers


class _Loader(yaml.SafeLoader):
    """Composes nodes; resolves plain scalars by YAML 1.2's core schema; knows no anchors, aliases or tags."""

    yaml_implicit_resolvers: Any = _core_schema()

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = cast("Any", super()).peek_event()
        if getattr(event, "anchor", None) is not None:
            raise MarkedYAMLError(
                problem="anchors (&x) and aliases (*x) are not used in jobs", problem_mark=event.start_mark
            )
        if getattr(event, "tag", None) is not None:
            raise MarkedYAMLError(problem="tags (!x) are not used in jobs", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def _override(root: MappingNode, override: str) -> None:
    path, equals, value = override.partition("=")
    source = f"--set {override}"
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise JobError(f"{source}: not of the form path=value", "write it like --set train.optimizer.lr=1e-4")
    try:
        _put(root, keys, _compose(value, source) or _scalar("", source), source)
    except KeyError as error:
        raise JobError(f"{source}: {path}: {error.args[0]}", "paths name keys; items count from 0") from None


def _put(node: Node, keys: list[str], new: Node, source: str) -> None:
    """Set what ``keys`` lead to, below ``node``, to ``new``; mappings on the way are made where missing."""
    key, rest = keys[0], keys[1:]
    if isinstance(node, SequenceNode):
        if not key.isdecimal() or int(key) >= len(node.value):
            raise KeyError(f"{key!r} is no item of a list of {len(node.value)}")
        if rest:
            _put(node.value[int(key)], rest, new, source)
        else:
            node.value[int(key)] = new
        return
    if not isinstance(node, MappingNode):
        raise KeyError(f"{key!r} would stand inside of a single value")
    found = [index for index, (name, _) in enumerate(node.value) if name.value == key]
    if not found:
        found = [len(node.value)]
        node.value.append((_scalar(key, source), _scalar("", source)))
    name, value = node.value[found[-1]]
    if not rest:
        node.value[found[-1]] = (_scalar(key, source), new)
        return
    if isinstance(value, ScalarNode) and value.tag == _TAG + "null":
        value = MappingNode(_TAG + "map", [], new.start_mark, new.end_mark)
        node.value[found[-1]] = (name, value)
    _put(value, rest, new, source)


def _scalar(value: str, source: str) -> ScalarNode:
    mark = Mark(source, 0, 0, 0, None, 0)
    return ScalarNode(_TAG + ("str" if value else "null"), value, mark, mark)


@dataclass
class _Reader:
    """Turns nodes into plain values, notes where each was written, collects what is wrong with them."""

    document: Document
    references: Collection[FieldPath]
    resolver: _Loader = field(default_factory=lambda: _Loader(""))

    def plain(self, node: Node, path: FieldPath) -> Any:
        """The value of ``node``, which stands at ``path``."""
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self._item(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._value(node.value, cast("Any", node).style is None, path)

    def _mapping(self, node: MappingNode, path: FieldPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode) or key_node.value == "<<":
                self._fault(path, "keys are plain words; merge keys (<<) are not used in jobs", key_node.start_mark)
                continue
            key = key_node.value
            here = (*path, key)
            if key in result:
                line = self.document.marks[here][0].line + 1
                self._fault(here, f"is given twice, first in line {line}; keep one of them", key_node.start_mark)
                continue
            self.document.marks[here] = (key_node.start_mark, value_node.start_mark)
            result[key] = self.plain(value_node, here)
        return result

    def _item(self, node: Node, path: FieldPath) -> Any:
        self.document.marks[path] = (node.start_mark, node.start_mark)
        return self.plain(node, path)

    def _value(self, text: str, bare: bool, path: FieldPath) -> Any:
        if path not in self.references:
            text = re.sub(r"\$\{([^}]*)\}", lambda match: self._substitute(match, path), text)
        if not bare:
            return _absolute(text)
        if re.fullmatch(r"[-+]?0[0-9]+", text):
            self._fault(path, f'{text} is octal to some, decimal to others; write {int(text)}, or "{text}" for text')
            return text
        kind = cast("Any", self.resolver).resolve(ScalarNode, text, (True, False)).removeprefix(_TAG)
        if kind in ("null", "bool"):
            return {"t": True, "f": False}.get(text[:1].lower())
        return int(text) if kind == "int" else float(text) if kind == "float" else _absolute(text)

    def _substitute(self, match: re.Match[str], path: FieldPath) -> str:
        name = match[1].removeprefix("env:")
        if name == match[1] or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            self._fault(path, f"{match[0]} means nothing here; the one substitution is ${{env:NAME}}")
        elif name not in os.environ:
            self._fault(path, f"the environment variable {name} is not set; set it, or write the value here")
        return os.environ.get(name, match[0])

    def _fault(self, path: FieldPath, message: str, mark: Mark | None = None) -> None:
        self.document.faults.append(Fault(path, message, mark=mark))


def _absolute(text: str) -> str:
    """``file://./x`` from the current folder; anything else as it is."""
    if not re.match(r"file://\.\.?(/|$)", text):
        return text
    return f"file://{(Path.cwd() / text.removeprefix('file://')).resolve()}"
