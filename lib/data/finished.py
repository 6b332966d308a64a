"""finished: what a finished 02_data left for later stages: its samples, and what makes tensors of them."""
import datasets

from lib.text.chat import Encoder


def samples_of(work, part: str) -> datasets.Dataset:
    """The samples of a part, "train" or "eval", in the order in which 02 wrote them."""
    return datasets.load_from_disk(str(work.input("02_data") / part))


def encoder_of(work) -> Encoder:
    """The encoder of these samples: processor, chat template and how media are decoded."""
    return Encoder.load(work.input("02_data") / "processor", work.config.trust_remote_code)
