"""The conformance tests of samplers: a class to inherit.

class TestDistinct(SamplerContract):
    method = "acme-distinct"  # a registered name, or `sampler = DistinctSampler`
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar
from unittest import SkipTest

from rlhf_core.config.base import BaseConfig
from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.infra.errors import RLHFError
from rlhf_core.infra.seeds import RandomState
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.contract import MethodContract, after, is_number, require
from rlhf_core.testing.kit_rewards import DigitReward
from rlhf_core.testing.option_values import SPEED_ALONE, other_values
from rlhf_core.testing.tiny import tiny_policy

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contracts.batch import Batch

STOP_REASONS = ("end", "length", "stop", "rule", "confidence")
"""What `Completion.stop_reason` may be."""
COUNTS = "test_n_completions_for_each_prompt"
TOKENS = "test_completions_are_complete"
OWN = "test_log_probabilities_are_the_policys"
REPEATS = "test_a_seed_repeats_the_completions"
SEED = 20


class SamplerContract(MethodContract):
    """The conformance tests of a sampler, on tiny policies."""

    kind = "sampler"
    sampler: ClassVar[type[Sampler] | None] = None
    """The class under test, in place of `method`."""
    tolerance: ClassVar[float] = 1e-4
    """Largest difference that rounding may make between log-probabilities of a token, nats, relative and absolute."""
    no_effect: ClassVar[Sequence[str]] = ()
    """Options that rightly change no completion and no score, such as how many are scored at once."""
    reward: DigitReward | None = None
    """The reward that `models` last returned."""

    def models(self) -> dict[str, Any]:
        """Return the models that the sampler is built from, by role: tiny policies, and the kit's reward.

        Override it where a role needs another model.
        """
        self.reward = DigitReward()
        made: dict[str, Any] = {}
        for seed, (role, kind) in enumerate(self._roles().items()):
            several = [tiny_policy(seed), tiny_policy(seed + 100)] if kind == "policies" else None
            made[role] = several or (tiny_policy(seed) if kind == "policy" else self.reward)
        return made

    def _roles(self) -> Mapping[str, str]:
        """Return the roles that the sampler needs with `options`."""
        return self.subject().roles_for(self.config())

    def instance(self) -> Sampler:
        """Return a new sampler with `options` and `models`."""
        return self.subject()(self.config(), **self.models())

    def token_logits(self, sampler: Sampler, batch: Batch, completions: Sequence[Completion]) -> Tensor:
        """Return (R, T, V) float32: the logits that each token of the completions was drawn from, at temperature 1.

        Override it for a sampler that draws from another distribution than the policy's.

        Args:
            batch: prompts and their completions.
            completions: R of them, in the order of the batch's responses.
        """
        states = sampler.policy.hidden_states(batch, drop_last=True)
        return states.to_tokens(sampler.policy.logits(states.predicting()))

    def prompts(self) -> list[Any]:
        """Return different prompts, as text."""
        return list(islice(ArithmeticTask().problems(seed=1), 3))

    def chats(self) -> list[Any]:
        """Return prompts as chat messages."""
        return list(islice(ArithmeticTask(chat=True).problems(seed=1), 2))

    def rows(self) -> list[dict[str, Any]]:
        """Return rows of data: prompts with other columns."""
        return list(ArithmeticTask().rows("prompt", 3, seed=1))

    def test_n_completions_for_each_prompt(self) -> None:
        """Each prompt gets exactly n completions, in the order of the prompts; no prompts get none."""
        sampler, prompts = self.instance(), self.prompts()
        for n in (1, 2, 3, 4):
            found = sampler.sample(prompts, n, seed=SEED)
            require(
                len(found) == len(prompts),
                f"`sample` returns {len(found)} lists of completions for {len(prompts)} prompts",
            )
            for number, completions in enumerate(found):
                require(len(completions) == n, f"prompt {number} gets {len(completions)} completions, not n = {n}")
                kinds = {type(one).__name__ for one in completions if not isinstance(one, Completion)}
                require(not kinds, f"prompt {number} gets {', '.join(sorted(kinds))} instead of `Completion`s")
        many = len(sampler.sample(prompts[:1], 17, seed=SEED)[0])
        require(many == 17, f"prompt 0 gets {many} completions, not n = 17")
        empty = sampler.sample([], 2, seed=SEED)
        require(len(empty) == 0, f"`sample` returns {len(empty)} lists of completions for no prompts")

    def test_one_completion_by_default(self) -> None:
        """Without `n`, each prompt gets one completion."""
        counts = [len(completions) for completions in self.instance().sample(self.prompts())]
        require(
            counts == [1] * len(self.prompts()),
            f"without `n`, the prompts get {counts} completions instead of one each",
        )

    @after(OWN)
    def test_chat_messages_are_prompts_too(self) -> None:
        """Prompts may be chat messages, rendered by the chat template as in training."""
        chats, sampler = self.chats(), self.instance()
        found = sampler.sample(chats, 2, seed=SEED)
        counts = [len(completions) for completions in found]
        require(
            counts == [2] * len(chats), f"{len(chats)} prompts of chat messages get {counts} completions, not 2 each"
        )
        self._require_own(sampler, chats, found, "chat")

    @after(OWN, REPEATS)
    def test_rows_are_prompts_too(self) -> None:
        """Prompts may be rows of data: their `prompt` is completed, and their other columns reach the reward."""
        rows, sampler = self.rows(), self.instance()
        reward, asked = self.reward, [row["prompt"] for row in rows]
        found = sampler.sample(rows, 2, seed=SEED)
        counts = [len(completions) for completions in found]
        require(counts == [2] * len(rows), f"{len(rows)} rows of data get {counts} completions, not 2 each")
        plain = self.instance().sample(asked, 2, seed=SEED)
        self._require_own(sampler, asked, found, "row")
        if "reward" not in self._roles().values():
            require(_ids(found) == _ids(plain), "rows of data get other completions than their prompts alone")
            return
        if reward is not None:
            answers = {str(columns.get("answer")) for columns in reward.columns}
            wanted = {row["answer"] for row in rows}
            require(
                answers == wanted,
                f"the column `answer` of the rows, {sorted(wanted)}, reaches the reward as {sorted(answers)}",
            )

    @after(COUNTS)
    def test_best_first(self) -> None:
        """All completions of a prompt have finite scores, the best first, or none has a score."""
        found = self.instance().sample(self.prompts(), 4, seed=SEED)
        for number, completions in enumerate(found):
            scores = [one.score for one in completions]
            if all(score is None for score in scores):
                continue
            numbers = [score for score in scores if score is not None and is_number(score)]
            require(len(numbers) == len(scores), f"prompt {number}: some scores aren't finite floats: {scores}")
            require(
                numbers == sorted(numbers, reverse=True),
                f"prompt {number}: completions aren't sorted with the best first; scores: {numbers}",
            )
        given = self.reward.given if self.reward is not None else {}
        pairs = [
            (one.score, given[tuple(one.ids)])
            for one in _flat(found)
            if one.score is not None and tuple(one.ids) in given
        ]
        if all(any(_close(score, value) for value in given.values()) for score, _ in pairs):
            for score, own in pairs:
                require(
                    _close(score, own),
                    f"a completion's score is {score:.4g}, which the reward gave to another completion; to this one it gave"
                    f" {own:.4g}",
                )

    @after(COUNTS)
    def test_larger_rewards_are_kept(self) -> None:
        """The first completions have larger rewards than those of the same sampler under the opposite reward."""
        worth = []
        for sign in (1, -1):
            models = self.models()
            if self.reward is None or self.reward not in models.values():
                raise SkipTest("the sampler isn't built from the kit's reward")
            self.reward.sign = sign
            firsts = [group[0] for group in self.subject()(self.config(), **models).sample(self.prompts(), seed=SEED)]
            worth.append(sum(self.reward.worth(one.text, one.ids) for one in firsts) / max(len(firsts), 1))
        require(
            worth[0] >= worth[1],
            f"the mean reward of the first completions is {worth[0]:.3f} under the kit's reward, and {worth[1]:.3f} under its"
            " opposite: larger rewards must be better",
        )

    @after(REPEATS)
    def test_every_option_does_something(self) -> None:
        """Each option has a value that changes a completion or a score."""

        def tried(config: BaseConfig) -> Any:
            found = self.subject()(config, **self.models()).sample(self.prompts(), 2, seed=SEED)
            return _ids(found), [one.score for one in _flat(found)]

        config, idle = self.config(), []
        for name, field in type(config).model_fields.items():
            if name in SPEED_ALONE and isinstance(config, SamplingConfig):
                continue
            base = None
            for value in (
                other_values(field.annotation, getattr(config, name))[:4] if name not in self.no_effect else ()
            ):
                try:
                    changed = config.updated(**{name: value})
                except RLHFError:
                    continue
                base = base or tried(config)
                if changed != config and tried(changed) != base:
                    break
            else:
                idle += [name] if base else []
        require(
            not idle,
            f"options without any effect on completions or scores: {', '.join(idle)}; use or remove each, or name it in"
            " `no_effect`",
        )

    @after(COUNTS)
    def test_completions_are_complete(self) -> None:
        """Completions have two log-probabilities per token, a stop reason that fits their ids, and the text of their ids."""
        sampler = self.instance()
        tokenizer = _tokenizer(sampler)
        for number, completions in enumerate(sampler.sample(self.prompts(), 4, seed=SEED)):
            place = f"prompt {number}"
            for one in completions:
                size = len(one.ids)
                for name in ("logprobs", "raw_logprobs"):
                    values = getattr(one, name)
                    require(
                        len(values) == size, f"{place}: a completion has {len(values)} `{name}` for {size} token ids"
                    )
                    wrong = [value for value in values if not _is_logprob(value)]
                    require(not wrong, f"{place}: `{name}` holds {wrong[:4]}, no log-probabilities")
                require(
                    len(one.kept_mass) in (0, size),
                    f"{place}: a completion has {len(one.kept_mass)} `kept_mass` for {size} token ids",
                )
                wrong = [value for value in one.kept_mass if not 0 < value <= 1 + 1e-6]
                require(not wrong, f"{place}: `kept_mass` holds {wrong[:4]}, no probabilities above 0")
                known = one.stop_reason in STOP_REASONS
                require(known, f"{place}: `stop_reason` is {one.stop_reason!r}, not one of {', '.join(STOP_REASONS)}")
                require(
                    one.mask is None or len(one.mask) == size,
                    f"{place}: a completion has {len(one.mask or ())} values of `mask` for {size} token ids",
                )
                if tokenizer is not None:
                    ended = bool(size) and one.ids[-1] == tokenizer.eos_token_id
                    require(
                        ended == (one.stop_reason == "end"),
                        f"{place}: `stop_reason` is {one.stop_reason!r}, but the last id is {'the' if ended else 'no'} end token",
                    )
                    text = tokenizer.decode(list(one.ids)[: size - ended])
                    # A stop string, or what a stopping rule removed, is no part of the text.
                    cut = one.stop_reason in ("stop", "rule") and text.startswith(one.text)
                    require(
                        one.text == text or cut,
                        f"{place}: the text of a completion is {one.text!r}, but its ids decode to {text!r}",
                    )

    @after(TOKENS)
    def test_log_probabilities_are_the_policys(self) -> None:
        """The policy, scoring the completions, gives each token the log-probabilities that its completion has."""
        sampler, prompts = self.instance(), self.prompts()
        self._require_own(sampler, prompts, sampler.sample(prompts, 3, seed=SEED), "prompt")

    @after(COUNTS)
    def test_a_seed_repeats_the_completions(self) -> None:
        """The same seed gives the same completions, on a used sampler and on a new one."""
        sampler, prompts = self.instance(), self.prompts()
        first = sampler.sample(prompts, 2, seed=SEED)
        for who, again in (("a second call", sampler), ("a new instance", self.instance())):
            require(
                _ids(again.sample(prompts, 2, seed=SEED)) == _ids(first),
                f"with the same seed, {who} gives other completions",
            )

    @after(REPEATS)
    def test_other_seeds_draw_otherwise(self) -> None:
        """Another seed gives other completions, and so does every call without a seed."""
        sampler, prompts = self.instance(), self.prompts()
        found = [sampler.sample(prompts, 4, seed=seed) for seed in (SEED, SEED + 1, None, None)]
        if all(value == 0 for one in _flat(found[0]) for value in one.logprobs):
            raise SkipTest("with these options nothing is drawn at random: every token has the probability 1")
        varied = any(len({tuple(one.ids) for one in group}) > 1 for group in found[0])
        require(varied, "the 4 completions of each prompt are all equal, though tokens are drawn at random")
        require(_ids(found[0]) != _ids(found[1]), "another seed gives the same completions")
        require(_ids(found[2]) != _ids(found[3]), "without a seed, a second call gives the same completions")

    @after(REPEATS)
    def test_completions_do_not_depend_on_other_prompts(self) -> None:
        """With a seed, a prompt gets the same completions and scores alone as together with other prompts.

        Those of prompts that share a budget depend on the others, but not on their order.
        """
        sampler, prompts = self.instance(), [*self.prompts(), *self.chats()]
        if self.subject().shares_budget:
            return self._require_any_order(sampler, prompts)
        together = sampler.sample(prompts, 2, seed=SEED)
        for number, prompt in enumerate(prompts):
            (alone,) = sampler.sample([prompt], 2, seed=SEED)
            same = _ids([alone]) == _ids([together[number]])
            require(same, f"prompt {number} gets other completions alone than together with {len(prompts) - 1} others")
            what = f"prompt {number}", f"together with {len(prompts) - 1} others", "alone"
            self._require_scores(alone, together[number], *what)
        return None

    def _require_any_order(self, sampler: Sampler, prompts: Sequence[Any]) -> None:
        """Fail unless prompts that share a budget get the same completions and scores in any order."""
        first = sampler.sample(prompts, 2, seed=SEED)
        for order in (range(len(prompts))[::-1], [*range(2, len(prompts)), 0, 1]):
            found = sampler.sample([prompts[number] for number in order], 2, seed=SEED)
            for number, group in zip(order, found, strict=True):
                same = _ids([group]) == _ids([first[number]])
                require(same, f"prompt {number} gets other completions where the prompts come in another order")
                self._require_scores(group, first[number], f"prompt {number}", "in one order", "in another")

    def _require_scores(
        self, group: Sequence[Completion], others: Sequence[Completion], what: str, there: str, here: str
    ) -> None:
        """Fail unless the completions of a prompt, sampled twice, have the same scores.

        Args:
            what: what the message calls the prompt.
            there: how it says where `others` come from.
            here: how it says where `group` comes from.
        """
        for one, other in zip(group, others, strict=True):
            equal = one.score == other.score or (
                one.score is not None
                and other.score is not None
                and math.isclose(one.score, other.score, rel_tol=self.tolerance, abs_tol=self.tolerance)
            )
            require(equal, f"a completion of {what} scores {one.score} {here} and {other.score} {there}")

    @after(COUNTS)
    def test_models_do_not_change(self) -> None:
        """Sampling changes no weights or modes of the policies, and leaves no gradients in them."""
        from rlhf_core.generation.sampler_models import policies_of

        sampler = self.instance()
        policies = policies_of(sampler)
        if not policies:
            raise SkipTest("the sampler has no policy")
        before = {role: [value.clone() for value in policy.state_dict().values()] for role, policy in policies.items()}
        for policy in policies.values():
            policy.train()
        sampler.sample(self.prompts(), 2, seed=SEED)
        for role, policy in policies.items():
            same = all(old.equal(new) for old, new in zip(before[role], policy.state_dict().values(), strict=True))
            require(same, f"sampling changes the weights of `{role}`")
            require(
                all(part.training for part in policy.modules()),
                f"sampling leaves modules of `{role}` in evaluation mode, which were in training mode",
            )
            require(
                all(one.grad is None for one in policy.parameters()),
                f"sampling leaves gradients in the parameters of `{role}`",
            )

    @after(OWN)
    def test_sampling_options_take_effect(self) -> None:
        """Sampling options take effect: the token limit holds, and `kept_mass` is the share that top-p and top-k kept.

        So does the least confidence.
        """
        config = self.config()
        options = {"max_new_tokens": 3, "temperature": 0.7, "top_p": 0.6, "top_k": 50}
        names = [name for name in type(config).model_fields if isinstance(getattr(config, name), SamplingConfig)]
        if not names and not isinstance(config, SamplingConfig):
            raise SkipTest("the sampler has no options of the type `SamplingConfig`")

        def under(**options: Any) -> Sampler:
            return self.subject()(
                config.updated(**(dict.fromkeys(names, options) if names else options)), **self.models()
            )

        sampler, prompts = under(**options), self.prompts()
        found = sampler.sample(prompts, 3, seed=SEED)
        longest = max(len(one.ids) for one in _flat(found))
        require(longest <= 3, f"with `max_new_tokens: 3` a completion has {longest} tokens")
        masses = [value for one in _flat(found) for value in (*one.kept_mass, *([1.0] * (not one.kept_mass)))]
        require(
            min(masses) < 0.99,
            "with `top_p: 0.6` and `top_k: 50`, every `kept_mass` is 1, as if nothing had been truncated",
        )
        self._require_own(sampler, prompts, found, "with top-p and top-k, prompt")
        sampler = under(max_new_tokens=3, temperature=0.7, top_p=1.0, top_k=2)
        self._require_kept_mass(sampler, prompts, sampler.sample(prompts, 3, seed=SEED), temperature=0.7, top_k=2)
        sure = under(max_new_tokens=3, min_confidence=1e6, confidence_window=2).sample(prompts, 3, seed=SEED)
        longest = max(len(one.ids) for one in _flat(sure))
        require(
            longest <= 2,
            f"with `min_confidence: 1e6` and `confidence_window: 2` a completion has {longest} tokens, not at most 2",
        )

    @after(COUNTS)
    def test_prompts_do_not_change(self) -> None:
        """Sampling doesn't change the caller's prompts and rows."""
        for prompts in (self.chats(), self.rows()):
            before = copy.deepcopy(prompts)
            self.instance().sample(prompts, 2, seed=SEED)
            require(prompts == before, f"`sample` changes its prompts: {prompts[0]!r}, before {before[0]!r}")

    @after(REPEATS)
    def test_global_random_state_does_not_change(self) -> None:
        """Sampling with a seed doesn't change the global random states of Python, numpy and torch."""
        sampler, prompts = self.instance(), self.prompts()
        before = RandomState.capture().to_json()
        sampler.sample(prompts, 2, seed=SEED + 5)  # no other check uses this seed
        now = RandomState.capture().to_json()
        moved = [name for name in ("python", "numpy", "torch_cpu") if now[name] != before[name]]
        require(not moved, f"sampling with a seed changes the global random state of {', '.join(moved)}")

    def _require_own(
        self, sampler: Sampler, prompts: Sequence[Any], found: Sequence[Sequence[Completion]], what: str
    ) -> None:
        """Fail unless completions have the log-probabilities that the policy gives to their tokens after these prompts.

        Args:
            found: each prompt's completions.
            what: what the message calls a prompt.
        """
        import torch

        from rlhf_core.contracts.batch import Batch
        from rlhf_core.generation.generate import prompt_batch

        if sampler.roles.get("policy") != "policy":
            return
        batch = Batch.from_completions(prompt_batch(sampler.policy, prompts), found)
        temperature = _temperature(sampler) if _only_truncates(sampler) else None
        checks = [("raw_logps", 1.0)] + ([("sampled_logps", temperature)] if temperature else [])
        with torch.no_grad():
            logits = self.token_logits(sampler, batch, _flat(found))
        for column, divisor in checks:
            if column not in batch.per_token:
                continue
            own = (logits / divisor).log_softmax(dim=-1).gather(2, batch.response_ids[..., None])[..., 0]
            stated = batch[column]
            if column == "sampled_logps" and "kept_mass" in batch.per_token:
                stated = stated + batch["kept_mass"].clamp(min=1e-30).log()
            wrong = ((stated - own).abs() > self.tolerance * (1 + own.abs())) & batch.loss_mask
            for response in wrong.any(dim=1).nonzero()[:1, 0].tolist():
                token = int(wrong[response].nonzero()[0, 0])
                raise AssertionError(
                    f"{what} {int(batch.owner[response])}: `{_FIELDS[column]}` of token {token} is {stated[response, token]:.4f}"
                    f" but the policy gives {own[response, token]:.4f}"
                )

    def _require_kept_mass(
        self,
        sampler: Sampler,
        prompts: Sequence[Any],
        found: Sequence[Sequence[Completion]],
        *,
        temperature: float,
        top_k: int,
    ) -> None:
        """Fail unless `kept_mass` is the probability, under the policy's tempered distribution, of its `top_k` likeliest tokens.

        Args:
            found: each prompt's completions, truncated by `top_k` alone.
        """
        import torch

        from rlhf_core.contracts.batch import Batch
        from rlhf_core.generation.generate import prompt_batch

        if sampler.roles.get("policy") != "policy" or not _only_truncates(sampler):
            return
        batch = Batch.from_completions(prompt_batch(sampler.policy, prompts), found)
        if "kept_mass" not in batch.per_token:
            return
        with torch.no_grad():
            logits = self.token_logits(sampler, batch, _flat(found))
        own = torch.softmax(logits / temperature, dim=-1).topk(top_k).values.sum(dim=-1)
        stated = batch["kept_mass"]
        wrong = ((stated - own).abs() > self.tolerance) & batch.loss_mask
        for response in wrong.any(dim=1).nonzero()[:1, 0].tolist():
            token = int(wrong[response].nonzero()[0, 0])
            raise AssertionError(
                f"with `top_k: {top_k}`, prompt {int(batch.owner[response])}: `kept_mass` of token {token} is"
                f" {stated[response, token]:.4f}, but the policy gives its {top_k} likeliest tokens {own[response, token]:.4f}"
            )


_FIELDS = {"raw_logps": "raw_logprobs", "sampled_logps": "logprobs"}
"""Columns of a batch of completions → the fields of `Completion` that they are made from."""


def _only_truncates(sampler: Sampler) -> bool:
    """Tell whether a sampler draws from the tempered distribution or its likeliest tokens.

    After a repetition penalty, or where end tokens may not come yet, each token has another distribution than the policy's.
    """
    config = sampler.config
    groups = [config, *(getattr(config, name) for name in type(config).model_fields)]
    return all(
        getattr(one, "repetition_penalty", 1.0) == 1.0 and not getattr(one, "min_new_tokens", 0)
        for one in groups
        if isinstance(one, SamplingConfig)
    )


def _temperature(sampler: Sampler) -> float | None:
    """Return the temperature in a sampler's configuration; None where there isn't exactly one, above 0."""
    config = sampler.config
    values = {name: getattr(config, name) for name in type(config).model_fields}
    found = [value.temperature for value in values.values() if isinstance(value, SamplingConfig)]
    found += [value for name, value in values.items() if name == "temperature" and is_number(value)]
    return float(found[0]) if len(found) == 1 and found[0] > 0 else None


def _tokenizer(sampler: Sampler) -> Any:
    """Return the policy's tokenizer, None without a policy."""
    return sampler.policy.tokenizer if sampler.roles.get("policy") == "policy" else None


def _ids(found: Sequence[Sequence[Completion]]) -> list[list[list[int]]]:
    return [[list(one.ids) for one in group] for group in found]


def _flat(found: Sequence[Sequence[Completion]]) -> list[Completion]:
    return [one for group in found for one in group]


def _close(score: float, value: float) -> bool:
    return math.isclose(score, value, rel_tol=1e-5, abs_tol=1e-9)


def _is_logprob(value: float) -> bool:
    # The sum of a softmax may exceed one by rounding.
    return math.isfinite(value) and value <= 1e-5
