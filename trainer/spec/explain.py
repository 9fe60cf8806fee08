"""Pydantic's errors, as a person wants to read them: where, what is wrong, what to write instead."""

import json
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import Tag, ValidationError

from .base import Spec
from .yaml import Fault, FieldPath, dotted


def schema_faults(error: ValidationError, root: type[Spec], secrets: frozenset[FieldPath]) -> list[Fault]:
    """Every error of a validation, in plain words; values at ``secrets`` are never repeated."""
    return [_fault(cast("Mapping[str, Any]", item), root, secrets) for item in error.errors(include_url=False)]


def models_below(root: type[Spec], seen: tuple[type[Spec], ...] = ()) -> Iterator[type[Spec]]:
    """``root`` and every model used in its fields, with repetitions."""
    yield root
    for info in root.model_fields.values():
        annotation = info.annotation
        for model in (*_members(annotation).values(), *_members(_item(annotation, 0)).values()):
            if model not in seen:
                yield from models_below(model, (*seen, root))


@dataclass(frozen=True)
class _Place:
    """Where an error is: the field's path, the model that holds the field, what the field may be."""

    path: FieldPath
    holder: type[Spec] | None = None
    tag: str = ""
    """Which member of a union the holder is."""
    others: Mapping[str, type[Spec]] = field(default_factory=dict[str, type[Spec]])
    """The union's other members."""
    annotation: Any = None


def _place(loc: tuple[str | int, ...], root: type[Spec]) -> _Place:
    """Follows a pydantic location, in which the tags of unions stand between the keys."""
    place, annotation = _Place(()), cast("Any", root)
    members = _members(annotation)
    tag, others = "", dict[str, type[Spec]]()
    for part in loc:
        if len(members) > 1:
            tag, others = str(part), {name: model for name, model in members.items() if name != part}
            members = {tag: members[tag]}
            continue
        holder = next(iter(members.values()), None)
        if holder and part in holder.model_fields:
            annotation = holder.model_fields[str(part)].annotation
        else:
            annotation = None if holder else _item(annotation, part)
        place = _Place((*place.path, part), holder, tag, others, annotation)
        members, tag, others = _members(annotation), "", {}
    return place


def _members(annotation: Any) -> dict[str, type[Spec]]:
    """The models that ``annotation`` allows, by tag."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return {_own_tag(annotation): annotation}
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        tags = (note.tag for note in notes if isinstance(note, Tag))
        return {next(tags, tag): model for tag, model in _members(inner).items()}
    if get_origin(annotation) in (Union, types.UnionType):
        return {tag: model for option in get_args(annotation) for tag, model in _members(option).items()}
    return {}


def _own_tag(model: type[Spec]) -> str:
    key = _discriminator(model)
    return get_args(model.model_fields[key].annotation)[0] if key else model.__name__


def _discriminator(model: type[Spec]) -> str | None:
    return next((name for name in ("family", "type", "backend") if name in model.model_fields), None)


def _item(annotation: Any, part: str | int) -> Any:
    """What a list or mapping holds at ``part``."""
    for option in (annotation, *get_args(annotation)):
        kinds = get_args(option)
        if get_origin(option) is tuple:
            return kinds[0] if kinds[-1] is Ellipsis else kinds[min(int(part), len(kinds) - 1)]
        if get_origin(option) is dict:
            return kinds[1]
    return None


def _fault(error: Mapping[str, Any], root: type[Spec], secrets: frozenset[FieldPath]) -> Fault:
    place = _place(error["loc"], root)
    context: Mapping[str, Any] = error.get("ctx", {})
    got = "" if place.path in secrets else f"; got {_shown(error['input'])}"
    match error["type"]:
        case "extra_forbidden":
            return Fault(place.path, _unknown_key(place, root), at_key=True)
        case "missing" if isinstance(place.path[-1], int):
            return Fault(place.path[:-1], f"has too few items{got}")
        case "missing":
            return Fault(place.path, f"is missing; write {_wanted(place.annotation, str(place.path[-1]))}")
        case "model_type" | "model_attributes_type" | "dict_type" if _members(place.annotation):
            return Fault(place.path, f"must be a mapping, like {_example(place.annotation)}{got}")
        case "string_type" if isinstance(error["input"], int | float):
            return Fault(place.path, f'must be text; put it in quotes: "{json.dumps(error["input"])}"')
        case "union_tag_not_found":
            key, choices = _tagging(place)
            return Fault((*place.path, key), f"is missing; write one of {', '.join(choices)}")
        case "union_tag_invalid":
            key, choices = _tagging(place)
            return Fault((*place.path, key), _choose(context["tag"], choices))
        case "literal_error":
            return Fault(place.path, _choose(error["input"], [str(choice) for choice in _choices(place.annotation)]))
        case "value_error":
            return Fault(place.path, str(context["error"]))
        case _:
            return Fault(place.path, _plainly(error, context) + got)


def _unknown_key(place: _Place, root: type[Spec]) -> str:
    key = str(place.path[-1])
    known = list(place.holder.model_fields) if place.holder else []
    owners = [tag for tag, model in place.others.items() if key in model.model_fields]
    if owners and place.holder and not _discriminator(place.holder):
        return f"does not go with {place.tag}; keep one of the two"
    if owners:
        return f"{place.tag} has no such key (it belongs to {', '.join(owners)}); remove it"
    if near := get_close_matches(key, known, 1):
        return f"unknown key; did you mean {near[0]}?"
    homes = [path for path in _paths(root, ()) if path[-1] == key and path[:-1] != place.path[:-1]]
    if homes:
        best = max(homes, key=lambda home: (_shared(home, place.path), -len(home)))
        return f"unknown key; did you mean {dotted(best)}?"
    return f"unknown key; known here: {', '.join(known)}"


def _paths(model: type[Spec], prefix: FieldPath) -> Iterator[FieldPath]:
    for name, info in model.model_fields.items():
        yield (*prefix, name)
        for member in _members(info.annotation).values():
            yield from _paths(member, (*prefix, name))


def _shared(one: FieldPath, other: FieldPath) -> int:
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)


def _tagging(place: _Place) -> tuple[str, list[str]]:
    """The key that chooses between a union's members, and its values."""
    members = _members(place.annotation)
    return next(filter(None, map(_discriminator, members.values()))), list(members)


def _choose(given: object, choices: list[str]) -> str:
    if str(given) in choices:
        return f'must be text; put it in quotes: "{given}"'
    near = get_close_matches(str(given).lower(), choices, 1)
    cure = f"did you mean {near[0]}?" if near else "write one of these"
    return f"{_shown(given)} is not one of {', '.join(choices)}; {cure}"


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of the ``Literal`` somewhere in ``annotation``."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((found for option in get_args(annotation) if (found := _choices(option))), ())


def _plainly(error: Mapping[str, Any], context: Mapping[str, Any]) -> str:
    kind: str = error["type"]
    texts = {
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_type": "must be a number",
        "finite_number": "must be a number",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "tuple_type": "must be a list: […]",
        "dict_type": "must be a mapping: {{key: value}}",
        "greater_than": "must be more than {gt:g}",
        "greater_than_equal": "must be at least {ge:g}",
        "less_than": "must be less than {lt:g}",
        "less_than_equal": "must be at most {le:g}",
        "too_short": "must have at least {min_length} item(s)",
        "too_long": "must have at most {max_length} item(s)",
    }
    if kind in texts:
        return texts[kind].format(**context)
    return re.sub("^Input should", "must", error["msg"]).removeprefix("Value error, ")


def _wanted(annotation: Any, key: str) -> str:
    if choices := _choices(annotation):
        return f"{key}: " + " or ".join(map(str, choices))
    if _members(annotation):
        return f"{key}: {{…}}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if get_origin(annotation) is tuple:
        return f"{key}: […]"
    return f"{key}: <{names.get(annotation, 'a value')}>"


def _example(annotation: Any) -> str:
    """A key that tells the models apart that ``annotation`` allows, or the first key of each."""
    models = _members(annotation).values()
    keys = dict.fromkeys(_discriminator(model) or next(iter(model.model_fields)) for model in models)
    return " or ".join(f"{{{key}: …}}" for key in keys)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
