"""Answers which backend to use from the JSON of `moebench policy`, with nothing but Python: copy this file to where it is needed."""

from collections.abc import Mapping
from typing import cast


def backend_for(
    policy: Mapping[str, object],
    num_tokens: int,
    *,
    model: str,
    device: str,
    act_dtype: str | None = "bf16",
    ep_size: int = 1,
    tp_size: int = 1,
    **more: str | int,
) -> str:
    """The backend of the stretch that num_tokens is in; act_dtype None asks the table over all activation formats.

    Between two stretches the upper one answers, as a server pads a batch to the next size it has captured; above the last one, the
    last. more are other keys of a table that must agree, such as scope="experts" or routing="uniform". Raises LookupError where no
    table answers, and where several do."""
    wanted = {"model": model, "device": device, "act_dtype": act_dtype, "ep_size": ep_size, "tp_size": tp_size, **more}
    tables = cast("list[dict[str, object]]", policy["tables"])
    found = [table for table in tables if all(table[name] == value for name, value in wanted.items())]
    if len(found) != 1:
        asked = ", ".join(f"{name}={value}" for name, value in wanted.items())
        raise LookupError(f"{len(found)} of the policy's {len(tables)} tables are for {asked}; exactly one has to be")
    stretches = cast("list[dict[str, object]]", found[0]["stretches"])
    if not stretches:
        raise LookupError(f"the table for {model} on {device} has no stretch")
    for stretch in stretches:
        if num_tokens <= cast(int, stretch["to_tokens"]):
            return str(stretch["backend"])
    return str(stretches[-1]["backend"])
