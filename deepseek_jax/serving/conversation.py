"""A conversation and its tools as a client writes them in JSON, checked and in the form that templates read."""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from deepseek_jax.serving.fields import told

MOST_TOOLS = 512
TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


class Choice(NamedTuple):
    """Which tools a reply may call.

    Attributes:
        mode: "none", "auto", or "required": a call, and nothing else.
        tools: that may be called, as the client wrote them.
        parallel: whether a reply may have several calls.
        described: the tools that the prompt tells of: more where `allowed_tools` leaves some out, so that the prompt
            stays the same, and its pages in the cache.
    """

    mode: Literal["none", "auto", "required"]
    tools: list[dict[str, Any]]
    parallel: bool
    described: list[dict[str, Any]]


def read_messages(value: Any) -> list[dict[str, Any]]:
    """Return the messages of a request, contents joined to texts, results in the order of their calls.

    Raises:
        ValueError: they are no conversation.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages is {_told(value)}; give a list of at least one message")
    return _in_order([_read_message(message, f"messages[{i}]") for i, message in enumerate(value)])


def read_choice(tools: Any, tool_choice: Any, parallel: bool) -> Choice:
    """Return which tools a reply may call, from the request's `tools`, `tool_choice`, `parallel_tool_calls`.

    Raises:
        ValueError: they are wrong, or name a tool that is not there.
    """
    found = [] if tools is None else _read_tools(tools)
    if tool_choice is None:
        tool_choice = "auto" if found else "none"
    if tool_choice in ("none", "auto") or (tool_choice == "required" and found):
        mode = tool_choice if found else "none"
        found = found if mode != "none" else []
        return Choice(mode, found, parallel, found)
    if tool_choice == "required":
        raise ValueError('tool_choice is "required", and there are no tools; give tools, or leave it out')
    if isinstance(tool_choice, Mapping) and tool_choice.get("type") == "allowed_tools":
        return _read_allowed(tool_choice.get("allowed_tools"), found, parallel)
    named = _named([tool_choice], found)
    return Choice("required", named, False, named)


def _read_allowed(value: Any, tools: list[dict[str, Any]], parallel: bool) -> Choice:
    mode, names = (value.get("mode"), value.get("tools")) if isinstance(value, Mapping) else (None, None)
    if mode not in ("auto", "required") or not isinstance(names, list) or not names:
        raise ValueError(
            f'tool_choice.allowed_tools is {_told(value)}; give {{"mode": "auto" or "required", "tools": [...]}}'
        )
    return Choice(mode, _named(names, tools), parallel, tools)


def _named(choices: list[Any], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the tools that `choices` name, in the order of the tools."""
    names = set()
    for choice in choices:
        function = choice.get("function") if isinstance(choice, Mapping) else None
        if not isinstance(function, Mapping) or choice.get("type", "function") != "function":
            raise ValueError(
                f'tool_choice is {_told(choice)}; give "none", "auto", "required",'
                ' {"type": "function", "function": {"name": ...}} or {"type": "allowed_tools", ...}'
            )
        name = function.get("name")
        if name not in [tool["function"]["name"] for tool in tools]:
            raise ValueError(f"tool_choice names {_told(name)}, which is none of the tools")
        names.add(name)
    return [tool for tool in tools if tool["function"]["name"] in names]


def _read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {_told(message)}; it must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"{where}.role is {_told(role)}; roles are {', '.join(_ROLES)}")
    found: dict[str, Any] = {"role": _ROLES[role]}
    calls = message.get("tool_calls")
    if role == "assistant" and calls:
        if not isinstance(calls, list):
            raise ValueError(f"{where}.tool_calls is {_told(calls)}; it must be a list")
        found["tool_calls"] = [_read_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    content = message.get("content")
    if content is None and role == "assistant" and (calls or message.get("refusal") or message.get("audio")):
        found["content"] = None if calls else ""
    else:
        found["content"] = _read_content(content, f"{where}.content")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if isinstance(message.get(key), str):
            found[key] = message[key]
    return found


def _read_content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return _whole(content, where)
    if not isinstance(content, list):
        raise ValueError(f"{where} is {_told(content)}; it must be a text, or a list of parts of type text")
    texts = []
    for i, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ValueError(f"{where}[{i}] is {_told(kind)}; this model reads parts of type text only")
        texts.append(text)
    return _whole("".join(texts), where)


def _whole(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half of a character at {error.start}; send whole ones") from error
    return text


def _read_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} is {_told(call)}; it must have a function with a name and arguments")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise ValueError(f"{where}.function.arguments is {_told(arguments)}; it must be a text in JSON")
    return {
        "id": call.get("id") if isinstance(call.get("id"), str) else "",
        "type": "function",
        "function": {
            "name": _whole(function["name"], f"{where}.function.name"),
            "arguments": _whole(arguments, f"{where}.function.arguments"),
        },
    }


def _read_tools(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ValueError(f"tools is {_told(value)}; it must be a list")
    if len(value) > MOST_TOOLS:
        raise ValueError(f"there are {len(value)} tools; at most {MOST_TOOLS} are taken")
    names = set()
    for i, tool in enumerate(value):
        where = f"tools[{i}]"
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise ValueError(f'{where} is {_told(tool)}; it must have the type "function" and a function')
        name = function.get("name")
        if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
            raise ValueError(f"{where}.function.name is {_told(name)}; it may have letters, digits and _ . : / - only")
        if name in names:
            raise ValueError(f"{where}.function.name is {_told(name)}, as that of another tool; give each its own")
        names.add(name)
        for key, kind, word in (("description", str, "a text"), ("parameters", Mapping, "an object")):
            if function.get(key) is not None and not isinstance(function[key], kind):
                raise ValueError(f"{where}.function.{key} is {_told(function[key])}; it must be {word}")
    return value


def _in_order(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the results behind calls into the order of the calls, where their ids say it: the model sees no ids."""
    ordered: list[dict[str, Any]] = []
    places: dict[str, int] = {}
    run = 0  # results at the end of `ordered`
    for message in messages:
        if message["role"] != "tool":
            places = {call["id"]: i for i, call in enumerate(message.get("tool_calls", ()))}
            run = 0
            ordered.append(message)
            continue
        ordered.append(message)
        run += 1
        results = ordered[-run:]
        if all(result.get("tool_call_id") in places for result in results):
            ordered[-run:] = sorted(results, key=lambda result: places[result["tool_call_id"]])
    return ordered


def _told(value: Any) -> str:
    return told(value)[:80]
