"""watch: the gradients of a run's first steps, so that what trains and never gets one is noticed at once."""
import re

import torch

from lib.models.roles import Roles
from lib.run import terminal
from lib.training.parallel import World

LEARNS_FROM = {"vision": {"image", "video"}, "audio": {"audio"},    # without such a medium, no gradient
               "projector": {"image", "video", "audio"}, "cross_attention": {"image", "video", "audio"}}


LAYER = re.compile(r".*\.\d+\.")                                   # a layer's path, the last number's


def waits_for(model, roles: Roles, role_of: dict[str, str]) -> dict[str, str]:
    """{trained parameter: the role whose media its gradient waits for}; role_of: its own role.

    That is its own, but in a layer with cross-attention, which rows without media skip as a whole.
    """
    crossed = {LAYER.match(name)[0] for name, _ in model.named_parameters()
               if roles.of(name) == "cross_attention" and LAYER.match(name)}
    return {name: "cross_attention" if (layer := LAYER.match(name)) and layer[0] in crossed else role
            for name, role in role_of.items()}


class GradientWatch:
    """Stops a run in which something that trains gets no gradient: it would be saved as it was.

    A tensor has until its second step, because LoRA's A gets a gradient only once B has moved. For a tensor
    through which only media pass, only steps with such media count, unless the data have none at all.
    """

    def __init__(self, roles: dict[str, str], kinds_in_data: set[str]):
        self.waiting = dict(roles)                                 # {parameter name: role}
        self.some_lack = bool({*roles.values()} & {*LEARNS_FROM, "experts"})   # in a step without media or so
        self.learnt: set[str] = set()                              # roles of which something has moved
        self.kinds_in_data = kinds_in_data
        self.steps, self.steps_for = 0, dict.fromkeys(LEARNS_FROM, 0)

    def look(self, parameters: dict[str, torch.nn.Parameter], world: World, kinds: set[str]) -> None:
        """Look at the gradients before a step's update; stop all ranks and name what got none in time.

        kinds: of the step's media. Experts may have had no token yet, and a model with a projector for sounds
        may train on pictures: tensors of these roles that got no gradient are only reported.
        """
        self.steps += 1
        for role, wanted in LEARNS_FROM.items():
            self.steps_for[role] += bool(kinds & wanted) or not self.kinds_in_data & wanted
        still = {name: role for name, role in self.waiting.items() if not moved(parameters[name])}
        self.learnt |= {role for name, role in self.waiting.items() if name not in still}
        self.waiting = still
        late = [name for name, role in self.waiting.items() if self.steps_for.get(role, self.steps) >= 2]
        spared = {"experts", "embedding"} | ({"projector"} & self.learnt)
        if not self.kinds_in_data:                                 # the language role brings it along
            spared.add("cross_attention")
        if without := [name for name in late if self.waiting[name] not in spared]:
            world.stop(f"{len(without)} of {len(parameters)} trained tensors got no gradient in two steps, "
                       f"such as {without[0]}", f"the data lack what {self.waiting[without[0]]} learns from: "
                       "leave that role out of lora_target_roles or train_roles")
        if late:
            of = " and ".join(sorted({self.waiting[name] for name in late}))
            terminal.warn(f"{len(late)} tensors of {of} have had no gradient: nothing was sent to them")
        for name in late:
            del self.waiting[name]


def moved(parameter: torch.nn.Parameter) -> bool:
    """Whether the parameter has a gradient other than zero."""
    return parameter.grad is not None and bool(parameter.grad.any())
