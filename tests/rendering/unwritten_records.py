"""Records with something that a chat template does not write, and where."""

_HI = {"role": "user", "content": "Hi"}
_TIDE = {"name": "tide", "arguments": {"port": "Brest"}}
HELLO_RECORD = {"messages": [_HI, {"role": "assistant", "content": "Hello!"}]}
CALL_RECORD = {"messages": [_HI, {"role": "assistant", "content": "", "tool_calls": [_TIDE]}]}
"""With the template of SmolLM2 the response is a bare <|im_end|>."""
CUTTING_TEMPLATE = """\
{%- for message in messages if message.role != 'tool' -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content.split('</think>')[-1].replace('Bye', 'Ciao') }}
{{- '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
"""Cuts reasoning, drops tools, calls and tool results, and changes a word."""
RECORDS = (
    {"messages": [_HI, {"role": "assistant", "content": "<think>Six times seven.</think>42."}]},
    {"messages": [_HI, {"role": "assistant", "content": "42.", "reasoning_content": "Six times seven."}]},
    {
        "tools": [{"name": "tide", "parameters": {}}],
        "messages": [
            _HI,
            {"role": "assistant", "content": "I look.", "tool_calls": [_TIDE]},
            {"role": "tool", "content": "6:10"},
            {"role": "assistant", "content": "At six."},
        ],
    },
    {"messages": [_HI, {"role": "assistant", "content": "Bye for now."}]},
    HELLO_RECORD,
)
PLACES = {
    "content": ["dialogue 3 (records[3]): message 1"],
    "reasoning": ["dialogue 0 (records[0]): message 1", "dialogue 1 (records[1]): message 1"],
    "tool_calls": ["dialogue 2 (records[2]): message 1: call 'tide'"],
    "tools": ["dialogue 2 (records[2]): tools: tool 'tide'"],
    "message": ["dialogue 2 (records[2]): message 2: tool"],
}
"""Of `RECORDS`, by kind."""
