"""DeepSeek's chat formats with tools: V3, R1 and V3.1.

V3 and R1 were published with a form for calls and results, and without one for the tools themselves: that is ours. The
published template writes `<｜Assistant｜>` again where a reply goes on behind results, and forgets the opening token of
the second round of calls; ours writes what the model writes.

    V3    <BOS>system TOOLS<｜User｜>question<｜Assistant｜>text<calls><call>function<sep>NAME
          ```json
          {...}
          ```<end of call><end of calls><EOS><outputs><output>result<end of output><end of outputs>answer<EOS>
    R1    the same; replies lose their reasoning, and the next one is opened with `<think>`
    V3.1  <BOS>system TOOLS<｜User｜>question<｜Assistant｜></think>text<calls><call>NAME<sep>{...}<end of call>
          <end of calls><EOS><output>result<end of output>answer<EOS>

V3.1's form of the tools is that of its model card. Its variable `thinking` opens the reply with `<think>`, instead of
closing the reasoning at once.
"""

from deepseek_jax.data.chat import ChatTemplate

CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
TURNS = ("<｜User｜>", "<｜Assistant｜>")

_CONVERSATION = r"""
    {{- bos_token + messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') }}
    {%- if tools %}
        @TOOLS
    {%- endif %}
    {%- set last = namespace(role='') %}
    {%- for message in messages %}
        {%- if message.role == 'tool' %}
            {{- @FIRST_OUTPUT if last.role != 'tool' else '' }}
            {{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}
        {%- elif message.role != 'system' %}
            {{- @LAST_OUTPUT if last.role == 'tool' else '' }}
        {%- endif %}
        {%- if message.role == 'user' %}
            {{- '<｜User｜>' + message.content }}
        {%- elif message.role == 'assistant' %}
            {{- '<｜Assistant｜>' + @PAST if last.role != 'tool' else '' }}
            {{- @REPLY if message.content else '' }}
            {%- if message.tool_calls %}
                {{- '<｜tool▁calls▁begin｜>' }}
                {%- for call in message.tool_calls %}
                    @CALL
                {%- endfor %}
                {{- '<｜tool▁calls▁end｜>' }}
            {%- endif %}
            {{- eos_token }}
        {%- endif %}
        {%- if message.role != 'system' %}
            {%- set last.role = message.role %}
        {%- endif %}
    {%- endfor %}
    {%- if last.role == 'tool' %}
        {{- @LAST_OUTPUT }}
    {%- elif add_generation_prompt %}
        {{- '<｜Assistant｜>' + @OPENING }}
    {%- endif -%}
    """

_V3_TOOLS = r"""{{- '\n\n## Tools\n\nYou can call these functions:\n' }}
        {%- for tool in tools %}
            {{- '\n' + tool.function | tojson + '\n' }}
        {%- endfor %}
        {{- '\nTo call one, write exactly this, where NAME is its name and ARGUMENTS is a JSON object that fits its'
            + ' parameters:\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n'
            + 'ARGUMENTS\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>\n\nSeveral calls stand one per line between the'
            + ' first and the last of these tokens.' }}"""
_V3_CALL = r"""{{- ('' if loop.first else '\n') + '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name
                        + '\n```json\n' + call.function.arguments + '\n```<｜tool▁call▁end｜>' }}"""

# https://huggingface.co/deepseek-ai/DeepSeek-V3.1, "ToolCall"
_V31_TOOLS = r"""{{- '\n\n## Tools\nYou have access to the following tools:\n' }}
        {%- for tool in tools %}
            {{- '\n### ' + tool.function.name + '\nDescription: ' + (tool.function.description or '')
                + '\n\nParameters: ' + (tool.function.parameters or {}) | tojson + '\n' }}
        {%- endfor %}
        {{- '\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n<｜tool▁calls▁begin｜>'
            + '<｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>'
            + '{additional_tool_calls}<｜tool▁calls▁end｜>\n\nWhere:\n\n'
            + '- `tool_call_name` must be an exact match to one of the available tools\n'
            + "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
            + '- For multiple tool calls, chain them directly without separators or spaces\n' }}"""
_V31_CALL = r"""{{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments
                        + '<｜tool▁call▁end｜>' }}"""


def _template(**parts: str) -> ChatTemplate:
    source = _CONVERSATION
    for name, part in parts.items():
        source = source.replace(f"@{name}", part)
    return ChatTemplate(source)


_WITHOUT_REASONING = "message.content.split('</think>')[-1]"
_V3_OUTPUTS = {"FIRST_OUTPUT": "'<｜tool▁outputs▁begin｜>'", "LAST_OUTPUT": "'<｜tool▁outputs▁end｜>'"}
V3 = _template(TOOLS=_V3_TOOLS, CALL=_V3_CALL, **_V3_OUTPUTS, PAST="''", REPLY="message.content", OPENING="''")
R1 = _template(
    TOOLS=_V3_TOOLS, CALL=_V3_CALL, **_V3_OUTPUTS, PAST="''", REPLY=_WITHOUT_REASONING, OPENING=r"'<think>\n'"
)
# of R1-0528, which opens its reasoning itself
R1_UNOPENED = _template(
    TOOLS=_V3_TOOLS, CALL=_V3_CALL, **_V3_OUTPUTS, PAST="''", REPLY=_WITHOUT_REASONING, OPENING="''"
)
V3_1 = _template(
    TOOLS=_V31_TOOLS,
    CALL=_V31_CALL,
    FIRST_OUTPUT="''",
    LAST_OUTPUT="''",
    PAST="'</think>'",
    REPLY=_WITHOUT_REASONING,
    OPENING="('<think>' if thinking else '</think>')",
)
