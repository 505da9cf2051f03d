"""Renders a model's chat template, which is a stranger's program, in a process of its own.

    python -m hub.render < job.json

reads {"template", "calls": [variables], "cpu_seconds"}, writes {"rendered": [texts]} or {"error"}.

Jinja's immutable sandbox lets a template reach nothing but its variables. What the sandbox does not
bound, the operating system does: seconds of CPU, memory, no file, no process. The text has a limit
of its own. hub/chat.py starts this with an empty environment and waits for a limited time.

Globals, filters and block rules are those with which transformers renders chat templates. One thing
differs: strftime_now tells a constant day, so that a run that goes on tomorrow keeps its prompts.
"""

import contextlib
import json
import math
import resource
import sys
import time
from datetime import datetime

import jinja2
from jinja2 import ext, nodes, utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 2**30  # of address space; Python and jinja2 take a twentieth
OUTPUT_CHARS = 100_000  # of one rendered text
OLDEST_JINJA = (3, 1, 6)  # there are known ways out of the sandbox of older ones
TODAY = datetime(2024, 7, 26)  # what Llama 3's own template says where no clock is at hand


class GenerationTag(ext.Extension):
    """{% generation %} ... {% endgeneration %} marks an answer, for masks: here only a scope."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Namespace(utils.Namespace):
    """namespace() without names that Python itself would look up."""

    def __init__(self, *args, **attributes):
        for name in dict(*args, **attributes):
            check_name(name)
        super().__init__(*args, **attributes)

    def __setitem__(self, name, value):
        check_name(name)
        super().__setitem__(name, value)


def check_name(name) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def raise_exception(message):
    raise jinja2.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Plain JSON: jinja2's own filter escapes <, >, & and ' for web pages."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["namespace"] = Namespace
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = TODAY.strftime
    return env


def render(template: jinja2.Template, variables: dict) -> str:
    parts, length = [], 0
    for part in template.generate(variables):
        length += len(part)
        if length > OUTPUT_CHARS:
            raise ValueError(f"it writes more than {OUTPUT_CHARS:,} characters")
        parts.append(part)
    return "".join(parts)


# what jinja2 and Python load only when they meet it: escapes, filters, a clock, an error
WARM_UP = """
{%- macro m(x) %}{{ x.split("\\u00e9\\n")[-1] | trim | tojson | lower }}{% endmacro %}
{%- set ns = namespace(n=1) %}
{%- for x in [["a"], ["b"]] | sort(reverse=true) %}{{ m(x[0]) }}{% endfor %}
{{- strftime_now("%d %B %Y") }}{{ "%s" | format(ns.n) }}{{ raise_exception("warm") }}
"""


def warm_up() -> None:
    """Load all of it while files can still be opened."""
    try:
        render(environment().from_string(WARM_UP), {})
    except jinja2.TemplateError as error:
        assert str(error) == "warm", error


def limit_resources(cpu_seconds: int) -> None:
    """From here on this process can't be given more; a bound that is lower already stays."""
    limits = {
        resource.RLIMIT_CPU: math.ceil(time.process_time()) + cpu_seconds,
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 3,  # stdin, stdout, stderr
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for name, bound in limits.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(name, (bound, bound))


def main() -> None:
    job = json.load(sys.stdin)
    warm_up()
    limit_resources(job["cpu_seconds"])
    try:
        version = tuple(int(part) for part in jinja2.__version__.split(".")[:3])
        if version < OLDEST_JINJA:
            raise ValueError(f"jinja2 {jinja2.__version__} is too old: pip install -U jinja2")
        template = environment().from_string(job["template"])
        answer = {"rendered": [render(template, variables) for variables in job["calls"]]}
    except MemoryError:
        answer = {"error": f"it needs more than {MEMORY_BYTES // 2**20:,} MiB of memory"}
    except Exception as error:  # whatever a stranger's program runs into
        answer = {"error": f"{type(error).__name__}: {error}"[:300]}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
