"""rope: a text model's rotary positions as the recipe wants them: another base or scaling, or longer rows.

The result is plain values of the text configuration, which the plan holds: training, the proof and exports
all set the same.

Source: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071).
"""
from lib.run import terminal
from lib.run.errors import StageError

TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
LEARNT = ("yarn", "longrope", "llama3", "dynamic")     # types scaled by the positions that training had
BY_LENGTH = ("longrope", "dynamic")                    # types scaled by max_position_embeddings, which stays


def changes(config, given: dict, sequence_len: int) -> dict:
    """{name: value} of the text configuration that a recipe changes: its rope, its number of positions.

    given: `overrides_of_model_config`. Raises StageError where the model has no rope to change.
    """
    text, found = config.get_text_config(), {}
    own, longest = getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)
    if given.keys() - {"max_position_embeddings"}:
        if not own:
            raise StageError(f"overrides_of_model_config: {config.model_type} has no rotary positions",
                             "remove overrides_of_model_config")
        kinds = [kind for kind, value in own.items() if isinstance(value, dict)]
        if kinds and "full_attention" not in kinds:
            raise StageError(f"overrides_of_model_config: {config.model_type} has a rope for each of "
                             f"{', '.join(kinds)}", "remove overrides_of_model_config")
        rope = scaled(own["full_attention"] if kinds else own, given, longest)
        found["rope_parameters"] = own | {"full_attention": rope} if kinds else rope
        own = rope
    if "max_position_embeddings" in given:
        found["max_position_embeddings"] = given["max_position_embeddings"]
    elif own and longest and longest < sequence_len and own.get("rope_type") not in BY_LENGTH:
        terminal.warn(f"sequence_len: {sequence_len} is more than the {longest} positions that base_model "
                      f"knows: max_position_embeddings becomes {sequence_len}")
        found["max_position_embeddings"] = sequence_len
    return found


def scaled(own: dict, given: dict, longest: int | None) -> dict:
    """A rope's parameters with the recipe's base and scaling in place of its own."""
    rope = own | {name: given["rope_theta"] for name in ("rope_theta",) if name in given}
    if scaling := given.get("rope_scaling"):
        kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor", "mrope_section",
                                              "mrope_interleaved") if name in rope}
        rope = kept | {"rope_type" if name == "type" else name: value for name, value in scaling.items()}
        if rope["rope_type"] not in TYPES:
            raise StageError(f"overrides_of_model_config: {rope['rope_type']} is no rope_type",
                             f"write one of {', '.join(TYPES)}")
        if rope["rope_type"] in LEARNT:
            rope.setdefault("original_max_position_embeddings", longest)
    return rope


def set_in(config, changed: dict):
    """The configuration with these values set in its text part; StageError if transformers refuses them."""
    text = config.get_text_config()
    for name, value in changed.items():
        setattr(text, name, value)
    if "rope_parameters" in changed:
        try:
            text.validate_rope()
        except (KeyError, ValueError, TypeError) as error:
            raise StageError(f"overrides_of_model_config: {str(error).strip()[:200]}",
                             "complete rope_scaling, as the model's card has it") from None
    return config
