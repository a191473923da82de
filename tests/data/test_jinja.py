"""What templates read is told by their program, not by words in their text."""

import pytest

from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.jinja import TIME

LOOP = "{{% for m in messages %}}{}{{% endfor %}}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ tools }}", True),
        ("{% if tools %}x{% endif %}", True),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}", True),
        ("{% macro show() %}{% generation %}{{ tools }}{% endgeneration %}{% endmacro %}", True),
        ("{# tools are not supported #}", False),
        ("I have no tools.{{ 'tools' }}", False),
        ("{% macro show(tools) %}{{ tools }}{% endmacro %}", False),
        ("{{ messages[0].tools }}", False),
    ],
)
def test_a_variable_is_read_where_its_value_is(source, expected):
    assert ChatTemplate(source).reads("tools") is expected


def test_the_present_is_read_by_a_call():
    assert ChatTemplate("{{ strftime_now('%Y') }}").reads(TIME)
    assert not ChatTemplate("{# no strftime_now here #}").reads(TIME)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (LOOP.format("{{ m.tool_calls }}"), True),
        (LOOP.format("{{ m['tool_calls'] }}"), True),
        (LOOP.format("{{ m.get('tool_calls') }}"), True),
        ("{% for m in messages | selectattr('tool_calls') %}{{ m.content }}{% endfor %}", True),
        ("{{ messages | map(attribute='tool_calls') | list }}", True),
        ("{% macro show(x) %}{{ x.tool_calls }}{% endmacro %}" + LOOP.format("{{ show(m) }}"), True),
        (LOOP.format("{{ m | tojson }}"), True),
        (LOOP.format("{{ m }}"), True),
        (LOOP.format("{% for key, value in m.items() %}{{ value }}{% endfor %}"), True),
        (LOOP.format("{% for key in m %}{{ m[key] }}{% endfor %}"), True),
        ("{% set rest = messages[1:] if tools else messages %}{{ (rest | reverse | list) | tojson }}", True),
        ("{% macro show(x) %}{{ x | tojson }}{% endmacro %}" + LOOP.format("{{ show(m) }}"), True),
        (LOOP.format("{# tool_calls are lost #}{{ m.content }}"), False),
        (LOOP.format("tool_calls{{ 'tool_calls' + m.content }}"), False),
        (LOOP.format("{{ m.content | tojson }}{{ tools | tojson }}{{ messages | length }}"), False),
        (LOOP.format("{% set text = m['content'] | trim %}{{ text }}"), False),
    ],
)
def test_a_field_is_read_by_name_or_with_its_message(source, expected):
    assert ChatTemplate(source).reads_field("tool_calls") is expected
