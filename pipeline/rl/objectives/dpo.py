"""DPO: the better take of a pair shall be denoised better than the worse one, compared with another policy.

    Diffusion-DPO (arXiv 2311.12908)      the starting policy
    SePPO (arXiv 2410.05255)              old_every, flip: an earlier policy, which also draws the takes
    RPO (arXiv 2407.12164)                similarity: the better takes are imitated besides

What the pairs are and how much each counts is the signal's (RankDPO, GAPO: `signal.weigh`).
"""

from __future__ import annotations

from pydantic import Field

from pipeline.config.sections.base import Natural, NonNegative, Positive
from pipeline.rl.objectives.base import Loss, Objective, Requirements, register
from pipeline.rl.objectives.micro_batch import MicroBatch


@register("dpo")
class DPO(Objective):
    """Diffusion-DPO (arXiv 2311.12908): -log sigmoid(-beta/2 [(M_w - M_w,ref) - (M_l - M_l,ref)]).

    M = mean_D |output - target|^2 of a finished take noised again, with the same noise for both takes; ref is the
    starting policy. At the start the loss is log 2. Pairs may come from takes of any version.
    """

    beta: Positive = Field(100.0, description="How strongly the policy compared with holds: larger is closer to it.")
    old_every: Natural = Field(
        0,
        description="Compare with an earlier policy, which also draws the takes, and becomes the trained one after "
        "every n-th step (SePPO); 0: with the policy that the run started from.",
    )
    flip: bool = Field(
        False,
        description="Where the policy compared with denoises the better take better than the trained one does, raise "
        "the worse take too instead of lowering it (SePPO's anchor criterion).",
    )
    similarity: NonNegative = Field(
        0.0, description="Weight of the better takes' own denoising error M_w beside the preference (RPO)."
    )

    @property
    def requirements(self) -> Requirements:
        return Requirements(
            draws_noise=False,
            replay_metric="onpolicy/max_abs_gap",
            feedback="pairs",
            any_sample=True,
            given_takes=not self.old_every,
            whole_group=True,
            reference_every=0 if self.old_every else 1,
            old_policy=self.old_every > 0,
            joins_levels=True,
            extra_replay_check=True,
        )

    def old_decay(self, step: int) -> float:
        """A snapshot: replaced as a whole, or kept."""
        return 0.0 if (step + 1) % self.old_every == 0 else 1.0

    @property
    def terms(self) -> dict[str, float]:
        return {"dpo_loss": 1.0, **({"similarity": self.similarity} if self.similarity else {})}

    @property
    def logged(self) -> tuple[str, ...]:
        return (*self.terms, "dpo/accuracy", "dpo/margin", *(("dpo/flipped",) if self.flip else ()))

    def loss(self, micro: MicroBatch) -> Loss:
        from torch.nn.functional import logsigmoid

        pairs = micro.pairs
        x0 = micro.clean()
        sigma, noise = micro.fresh_noise()
        x, target = micro.noised(x0, sigma, noise), micro.target(x0, sigma, noise)
        compared = micro.old_output(x) if self.old_every else micro.reference_output(x)
        error = (micro.output(x).float() - target).pow(2).flatten(1).mean(1)
        change = error - (compared.float() - target).pow(2).flatten(1).mean(1)
        better, worse = change[pairs.better], change[pairs.worse]
        flipped = (better.detach() > 0.0).float() if self.flip else better.new_zeros(better.shape)
        margin = -self.beta / 2.0 * (better - (1.0 - 2.0 * flipped) * worse)
        dpo_loss = -pairs.weights * logsigmoid(margin)
        similarity = error[pairs.better]
        logs = {
            "dpo_loss": dpo_loss.detach(),
            "similarity": similarity.detach(),
            "dpo/accuracy": (better < worse).float(),
            "dpo/margin": margin.detach(),
            "dpo/flipped": flipped,
        }
        return Loss(
            pairs.per_take(dpo_loss + self.similarity * similarity, len(x0)),
            {name: pairs.per_take(logs[name], len(x0)) for name in self.logged},
            replay_error=micro.replay_error(),
        )
