r"""Gradient descent on one column for each group of samples that have come together.

Eq. (1) sees the samples of a class only through their columns of H_1. The gradient of sample i is

  \nabla_{h_i} = \frac{1}{N} J(h_i)^T r(h_i) + \lambda_{H_1} h_i,

with the residual r(h) = f(h) - y and the Jacobian J of the network, and does not ask how many
samples there are in its place; the gradient of W_l is the sum over samples. So if the samples form
groups g of n_g equal columns, they stay equal, and descent on all N columns is descent on one
column a group, whose contribution to the weights is counted n_g times: exactly, for all time. With
one group a class this is Eq. (1) with n = 1, decay n \lambda_{H_1} and rate lr / n on the features.

For samples that are close but not equal write h_i = \mu_g + \delta_i with \sum_i \delta_i = 0.
While the group shares one activation pattern, f is linear in h on it, f(h) = A h, and

  \delta_i <- (I - lr (\lambda_{H_1} I + A^T A / N)) \delta_i,

so each deviation shrinks by at least the factor 1 - lr \lambda_{H_1} in a step (A^T A / N is far
below 2 / lr where descent is stable). The means feel the deviations at second order alone: the
linear term of each sum over the group vanishes, and what is left, such as
\sum_i A \delta_i \delta_i^T, is |\delta|^2. Where a ReLU bends between the samples of a group the
error is of first order, in those samples and that unit alone. Finite steps make that happen where
a minimum lies on a kink, and scatter a group by about what one step moves, in float64 as in
float32; so deviations end not at 0 but at a level in proportion to the rate.

Hence the criterion of `find_groups`: every sample is within `scatter(decay, learning_rate)` = lr
\lambda_{H_1}, relative to the size of the features, of the centre of its group: it is nearer than
one step of the decay moves it. The neglected term is the square, 4e-6 at the paper's setting, and
falls by e^2 every 1 / (lr \lambda_{H_1}) steps. Summed over time it displaces the parameters, in
directions in which the loss is flat, by no more than about (lr \lambda_{H_1})^2 / \lambda_{H_1};
tests find 1e-4 of 4e-4 on smooth models in float64, and losses that agree to 1e-8. With the ReLU
descent amplifies any difference, be it rounding: in float32 at the paper's setting, to change the
order of the samples changes H_1 by 0.5 to 8 percent after 2,000 steps and, of ten runs of 200,000
steps, where three end. No two programs agree on such a trajectory; with and without the reduction
all ten runs end at the same solution, with losses within 0.04 percent.

A sample that stays away from its class, such as one whose features died, is a group of its own; a
class that does not come together keeps the run on all its samples.

`descend` is `training.descend` with the groups given. It leaves the deviations as they are, so the
full state is at hand at every record, and descent on all samples can take over again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from dufm_jax import dufm, linalg, training
from dufm_jax.problem import Decay, Params, Problem

_GROUPS_PER_CLASS = 3  # At most, and 2 K in all: beyond, the samples have not come together.


def scatter(decay: ArrayLike, learning_rate: ArrayLike) -> Any:
    r"""lr \lambda_{H_1}, the relative length of one step of the decay of H_1."""
    return decay * learning_rate


def find_groups(
    features: Float[Array, "d N"], num_classes: int, tolerance: ArrayLike
) -> tuple[Int[Array, " N"], Int[Array, ""]]:
    """Groups of samples of one class that have come together.

    The first group of a class is around the median of its samples, coordinate by coordinate, and
    each further one around the first sample left.

    Args:
      features: H_1, [d_1, N], class by class.
      num_classes: K.
      tolerance: The largest distance of a sample from the centre of its group, in units of the
        root mean square norm of a column of H_1.

    Returns:
      The group of each sample, [N], numbered from 0 class by class, and the number of groups; or
      0 as the number, where more than 2 K groups, or 3 of one class, or one for each sample would
      be needed.
    """
    samples = features.reshape(features.shape[0], num_classes, -1)
    reach = (tolerance * jnp.sqrt(jnp.mean(jnp.sum(features**2, axis=0)))).astype(features.dtype)
    free = jnp.ones(samples.shape[1:], bool)
    level = jnp.zeros(samples.shape[1:], jnp.int32)
    used = []
    for index in range(_GROUPS_PER_CLASS):
        if index == 0:
            centre = jnp.median(samples, axis=2, keepdims=True)
        else:
            first = jnp.argmax(free, axis=1)[None, :, None]
            centre = jnp.take_along_axis(samples, first, axis=2)
        near = free & (jnp.linalg.norm(samples - centre, axis=0) <= reach)
        level = jnp.where(near, index, level)
        free = free & ~near
        used.append(jnp.any(near, axis=1))
    numbers = jnp.cumsum(jnp.stack(used, axis=1).ravel()).astype(jnp.int32) - 1
    groups = jnp.take_along_axis(numbers.reshape(num_classes, -1), level, axis=1)
    count = numbers[-1] + 1
    fewer = (count <= 2 * num_classes) & (count < groups.size)
    found = ~jnp.any(free) & fewer & jnp.isfinite(reach)
    return groups.ravel(), jnp.where(found, count, 0)


@linalg.full_precision
def descend(
    state: training.State,
    decay: Decay,
    learning_rate: ArrayLike,
    groups: Int[Array, " N"],
    *,
    num_groups: int,
    problem: Problem,
    num_records: int,
    record_every: ArrayLike,
    measure: Callable[[Params, Decay], Any],
    nonlinearity: dufm.Nonlinearities = dufm.relu,
) -> tuple[training.State, Any]:
    """Plain gradient descent, one column a group; otherwise as `training.descend`.

    Every sample moves with the mean of its group. Divergence is noticed at the records.

    Args:
      state: Where to go on.
      decay: The regularisation strengths.
      learning_rate: The step size.
      groups: The group of each sample, [N].
      num_groups: G, above all of `groups`; the cost of a step is in proportion.
      problem: The sizes, of the full problem.
      num_records: How many points to record, at least 1.
      record_every: The steps before each of them, at least 1.
      measure: As for `training.descend`.
      nonlinearity: One for all hidden layers, or L - 1 of them.

    Returns:
      The state after the last step, of all samples, and what `measure` returned, stacked along a
      leading axis [num_records].
    """
    dtype = state.params.features.dtype
    decay = jax.tree.map(lambda leaf: leaf.astype(dtype), decay)
    learning_rate = jnp.asarray(learning_rate, dtype)
    member = jax.nn.one_hot(groups, num_groups, dtype=dtype)  # [N, G]
    counts = jnp.sum(member, axis=0)[:, None]  # [G, 1]
    average = member / jnp.maximum(counts, 1).T  # [N, G]
    targets = average.T @ dufm.labels(problem, dtype).T  # [G, K]
    activations = dufm.per_layer(nonlinearity, problem.depth - 1)
    # Units that are 0 stay 0 under the ReLU, and products in whole vectors are faster.
    lanes = 16 if nonlinearity is dufm.relu else 1
    spare = [-width % lanes for width in problem.widths] + [0]

    # Columns of H_1 are rows here, and weights [in, out]: the products of XLA:CPU want it so.
    def step(_: Any, rows: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
        features, weights = rows
        posts, pullbacks = [features], []
        for weight, activation in zip(weights[:-1], activations, strict=True):
            post, pullback = _apply(activation, posts[-1] @ weight)
            posts.append(post)
            pullbacks.append(pullback)
        gradient = (posts[-1] @ weights[-1] - targets) / problem.num_samples
        moved: list[Array] = []
        for index in reversed(range(problem.depth)):
            weight = weights[index]
            slope = posts[index].T @ (counts * gradient) + decay.weights[index] * weight
            moved.insert(0, weight - learning_rate * slope)
            gradient = gradient @ weight.T
            if index:
                gradient = pullbacks[index - 1](gradient)
        return features - learning_rate * (gradient + decay.features * features), moved

    def record(state: training.State, _: None) -> tuple[training.State, Any]:
        features, weights = state.params
        centre = features[:, :1]  # Means of differences, which are exact where samples are equal.
        means = average.T @ (features - centre).T + centre.T  # [G, d_1]
        rows = (
            jnp.pad(means, ((0, 0), (0, spare[0]))),
            [
                jnp.pad(weight.T, ((0, before), (0, after)))
                for weight, before, after in zip(weights, spare[:-1], spare[1:], strict=True)
            ],
        )
        moved, weights_then = jax.lax.fori_loop(0, record_every, step, rows)
        moves = moved[:, : features.shape[0]] - means
        params = Params(
            features + (member @ moves).T,
            tuple(
                weight[:inputs, :outputs].T
                for weight, (outputs, inputs) in zip(
                    weights_then, problem.weight_shapes, strict=True
                )
            ),
        )
        reached = state._replace(params=params, step=state.step + record_every)
        loss = dufm.objective(params, problem, decay, nonlinearity)
        return training.mark_divergence(reached, loss), measure(params, decay)

    return jax.lax.scan(record, state, None, length=num_records)


def _apply(activation: dufm.Nonlinearity, pre: Array) -> tuple[Array, Callable[[Array], Array]]:
    """The nonlinearity's values and the pullback of its derivative."""
    post, pullback = jax.vjp(activation, pre)
    return post, lambda gradient: pullback(gradient)[0]
