"""Which linear layers carry an adapter: `target_modules`, read as PEFT reads it.

Linear layers go by their module paths; lm_head and embeddings are none."""

import re

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def find_targets(linears: list[str], target_modules) -> list[str]:
    """Those of the linear layers that names, PEFT's "all-linear" or a regular expression mean."""
    if target_modules == "all-linear":
        return linears
    if isinstance(target_modules, str):
        try:
            found = [name for name in linears if re.fullmatch(target_modules, name)]
        except re.error as error:
            raise ValueError(f"target_modules {target_modules!r}: {error}") from None
        unused = [] if found else [target_modules]
    else:
        found = [name for name in linears if any(is_path_end(t, name) for t in target_modules)]
        unused = sorted(set(target_modules) - set(used_targets(linears, target_modules)))
    if unused or not found:
        raise ValueError(
            f"target_modules {unused or list(target_modules)} match no linear layer that can carry "
            f"an adapter (lm_head and embeddings cannot); known: {TARGET_MODULES}"
        )
    return found


def used_targets(linears: list[str], targets):
    """Those of a list that match something: PEFT ignores the others when it reads an adapter."""
    if isinstance(targets, str):
        return targets
    used = [t for t in targets if any(is_path_end(t, name) for name in linears)]
    return used or targets


def is_path_end(target: str, name: str) -> bool:
    """PEFT: "q_proj", "self_attn.q_proj" and the whole path all mean that layer."""
    return f".{name}".endswith(f".{target}")
