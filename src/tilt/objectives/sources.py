"""Where each row of the two tables comes from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# fmt: off
SOURCES: Mapping[str, str] = MappingProxyType({
    "sft": "maximum likelihood",
    "raft": "RAFT, [2304.06767](https://arxiv.org/abs/2304.06767)",
    "reinforce": "Williams 1992",
    "reinforce_rtg": "Williams 1992; reward-to-go",
    "reinforce_baseline": "Williams 1992; critic as baseline",
    "a2c": "A2C, [1602.01783](https://arxiv.org/abs/1602.01783); on language models with the numbers of RL4LMs, [2210.01241](https://arxiv.org/abs/2210.01241)",
    "nlpo": "NLPO, [2210.01241](https://arxiv.org/abs/2210.01241): PPO with the numbers of RL4LMs, inside a `mask`",
    "rloo": "RLOO, [2402.14740](https://arxiv.org/abs/2402.14740)",
    "rloo_clip": "RLOO with a clipped ratio of whole answers, as in TRL 0.12.1; more than one pass",
    "ppo": "PPO, [1707.06347](https://arxiv.org/abs/1707.06347); for language models [2203.02155](https://arxiv.org/abs/2203.02155)",
    "reinforce_pp": "REINFORCE++, [2501.03262](https://arxiv.org/abs/2501.03262)",
    "reinforce_pp_baseline": "REINFORCE++-baseline, [2501.03262](https://arxiv.org/abs/2501.03262)",
    "grpo": "GRPO, DeepSeekMath eq. 3, [2402.03300](https://arxiv.org/abs/2402.03300)",
    "grpo_r1": "the sequence form of DeepSeek-R1, [2501.12948](https://arxiv.org/abs/2501.12948)",
    "dr_grpo": "Dr. GRPO, [2503.20783](https://arxiv.org/abs/2503.20783)",
    "dapo": "DAPO, [2503.14476](https://arxiv.org/abs/2503.14476)",
    "lite_ppo": "Lite PPO, [2508.08221](https://arxiv.org/abs/2508.08221)",
    "gspo": "GSPO, [2507.18071](https://arxiv.org/abs/2507.18071)",
    "gspo_token": "GSPO-token, [2507.18071](https://arxiv.org/abs/2507.18071)",
    "cispo": "CISPO, MiniMax-M1, [2506.13585](https://arxiv.org/abs/2506.13585)",
    "sapo": "SAPO, [2511.20347](https://arxiv.org/abs/2511.20347)",
    "reward_model": "Bradley-Terry, [2203.02155](https://arxiv.org/abs/2203.02155); offset [2307.09288](https://arxiv.org/abs/2307.09288); centring [2312.09244](https://arxiv.org/abs/2312.09244)",
    "dpo": "DPO, [2305.18290](https://arxiv.org/abs/2305.18290); `link.smoothing` gives conservative DPO",
    "dft": "DFT, [2508.05629](https://arxiv.org/abs/2508.05629)",
    "ppo_sequence": "PPO as in DeepSeekMath eq. 1, averaged over answers, [2402.03300](https://arxiv.org/abs/2402.03300)",
    "ppo_dual_clip": "dual clip, [1912.09729](https://arxiv.org/abs/1912.09729)",
    "grpo_process": "GRPO with process supervision, [2402.03300](https://arxiv.org/abs/2402.03300)",
    "grpo_unbiased_kl": "GRPO with k3 weighted by the ratio, DeepSeek-V3.2, [2512.02556](https://arxiv.org/abs/2512.02556)",
    "grpo_two_sided": "two-sided clip, INTELLECT-2, [2505.07291](https://arxiv.org/abs/2505.07291)",
    "grpo_tis": "GRPO with truncated importance weights for another sampler, [1606.02647](https://arxiv.org/abs/1606.02647)",
    "decoupled_ppo": "decoupled PPO, AReaL, [2110.00641](https://arxiv.org/abs/2110.00641), [2505.24298](https://arxiv.org/abs/2505.24298)",
    "high_entropy": "DAPO on the fifth of the actions with the highest entropy, [2506.01939](https://arxiv.org/abs/2506.01939)",
    "skywork": "Skywork-OR1, entropy kept near a target, [2505.22312](https://arxiv.org/abs/2505.22312)",
    "luspo": "GSPO summed over actions",
    "gmpo": "GMPO, [2507.20673](https://arxiv.org/abs/2507.20673)",
    "vespo": "VESPO, smooth weights of whole answers",
    "distill": "on-policy distillation, [2306.08543](https://arxiv.org/abs/2306.08543), [2306.13649](https://arxiv.org/abs/2306.13649); `reference` is the teacher",
})
# fmt: on
