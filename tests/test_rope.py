"""Positions: another base or scaling of the rope reaches the loaded model, and longer rows raise their number."""

import pytest
import torch

from lib.models import model, plan
from lib.run.errors import StageError
from tests.test_model import knobs

CPU = torch.device("cpu")
LINEAR = {"rope_scaling": {"type": "linear", "factor": 4.0}}


def frequencies(loaded):
    return loaded.model.language_model.rotary_emb.inv_freq


def test_a_linear_scaling_divides_every_frequency_and_a_base_changes_them(zoo):
    own = frequencies(model.load(plan.make_plan(knobs(zoo("llava"))), CPU))
    slower = model.load(plan.make_plan(knobs(zoo("llava"), overrides_of_model_config=LINEAR)), CPU)
    torch.testing.assert_close(frequencies(slower), own / 4)
    made = plan.make_plan(knobs(zoo("llava"), overrides_of_model_config={"rope_theta": 500_000}))
    width = 2 * len(own)
    wanted = 500_000.0 ** -(torch.arange(0, width, 2) / width)
    torch.testing.assert_close(frequencies(model.load(made, CPU)), wanted)


def test_where_layers_have_ropes_of_their_own_the_far_seeing_ones_are_changed(zoo):
    base = plan.make_plan(knobs(zoo("gemma3")))
    made = plan.make_plan(knobs(zoo("gemma3"), overrides_of_model_config=LINEAR))
    rope = plan.planned_config(made).get_text_config().rope_parameters
    assert rope["full_attention"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 1_000_000.0}
    assert rope["sliding_attention"] == plan.planned_config(base).get_text_config().rope_parameters["sliding_attention"]


def test_longer_rows_raise_the_number_of_positions_with_a_word(zoo, capsys):
    made = plan.make_plan(knobs(zoo("llava"), sequence_len=5000))
    assert made["text_config"] == {"max_position_embeddings": 5000}
    assert "max_position_embeddings becomes 5000" in " ".join(capsys.readouterr().out.split())
    yarn = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    made = plan.make_plan(knobs(zoo("llava"), sequence_len=5000, overrides_of_model_config=yarn))
    assert made["text_config"]["rope_parameters"]["original_max_position_embeddings"] == 4096


@pytest.mark.parametrize("scaling, words, fix", [
    ({"rope_type": "linear"}, "factor", "complete rope_scaling, as the model's card has it"),
    ({"rope_type": "wide"}, "wide is no rope_type", "write one of default, linear, dynamic, yarn, longrope, llama3")])
def test_a_scaling_that_nobody_knows_ends_in_two_lines(zoo, scaling, words, fix):
    with pytest.raises(StageError, match=words) as caught:
        plan.make_plan(knobs(zoo("llava"), overrides_of_model_config={"rope_scaling": scaling}))
    assert caught.value.fix == fix
