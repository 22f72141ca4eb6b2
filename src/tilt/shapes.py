"""The axes of every tensor in Tilt, as jaxtyping names.

G prompts, S sampled sequences, A actions (sampled tokens), T tokens in a pack, V vocabulary, D width of the model.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

PerAction = Float[Tensor, "A"]
PerSequence = Float[Tensor, "S"]
PerPrompt = Float[Tensor, "G"]
ActionIndex = Int[Tensor, "A"]
SequenceIndex = Int[Tensor, "S"]
TokenIndex = Int[Tensor, "T"]
SequenceMask = Bool[Tensor, "S"]
ActionMask = Bool[Tensor, "A"]
Logits = Float[Tensor, "A V"]
Hidden = Float[Tensor, "T D"]
Scalar = Float[Tensor, ""]
