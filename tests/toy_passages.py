"""Three passages of a corpus, a question, and two heads of the small random reader."""

from toy_tokenizers import prose

import dhlens as dh
from dhlens.tasks.corpus import Passage

PASSAGES = [Passage(f"p{i}", f"The {name}", prose(2, seed=i)) for i, name in enumerate("heron river miller".split())]
QUESTION = "Which garden did the heron watch?"
HEADS = dh.HeadSet([(0, 1), (1, 3)], (2, 4))
