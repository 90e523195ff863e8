"""`generate` and `stream`: against the plain definition, and what they refuse."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DEEPSEEK_V3, LLAMA, MIXTRAL
from weights import draw

import eqx_moe
from eqx_moe.execution import Capacity, ExpertParallel
from eqx_moe.family.generation_config import GenerationConfig
from eqx_moe.generation import decode
from eqx_moe.generation.sampling import Sampling, choose

PROMPTS = [[5, 7, 9], [3, 4, 5, 6, 7, 8, 9, 10, 11], [8]]


@pytest.fixture(scope="module")
def model():
    model = draw(dataclasses.replace(MIXTRAL[3].parsed, num_hidden_layers=1))  # a window shorter than the text
    return dataclasses.replace(model, generation_config=GenerationConfig())


@pytest.fixture(scope="module")
def greedy(model):
    """Each prompt's continuation by the definition: the most probable next token, by a full forward every time."""
    run = eqx.filter_jit(model)

    def continuation(prompt, new):
        ids = list(prompt)
        for _ in range(new):
            padded = jnp.asarray(ids + [0] * (32 - len(ids)))
            ids.append(int(run(padded)[len(ids) - 1].argmax()))
        return ids[len(prompt) :]

    return [continuation(prompt, 18) for prompt in PROMPTS]


def test_greedy_is_the_definition_for_prompts_of_any_length(model, greedy):
    assert eqx_moe.generate(model, PROMPTS, max_new_tokens=18) == greedy


def test_rows_do_not_depend_on_their_batch(model, greedy):
    assert eqx_moe.generate(model, PROMPTS[:1], max_new_tokens=18) == greedy[:1]
    options = dict(max_new_tokens=18, temperature=1.3, top_k=11, top_p=0.9, seed=4)
    drawn = eqx_moe.generate(model, PROMPTS, **options)
    assert drawn[:1] == eqx_moe.generate(model, PROMPTS[:1], **options)
    assert drawn != greedy and drawn != eqx_moe.generate(model, PROMPTS, **{**options, "seed": 5})


def test_stream_gives_the_same_ids(model, greedy):
    assert list(eqx_moe.stream(model, PROMPTS[0], max_new_tokens=18)) == greedy[0]
    options = dict(max_new_tokens=18, temperature=1.3, top_k=11, top_p=0.9, seed=4)
    assert list(eqx_moe.stream(model, PROMPTS[0], **options)) == eqx_moe.generate(model, PROMPTS[:1], **options)[0]
    assert list(eqx_moe.stream(model, PROMPTS[0], max_new_tokens=1)) == greedy[0][:1]


def test_a_row_ends_with_its_eos(model, greedy):
    ends = {greedy[0][4], greedy[1][7]}
    expected = [row[: next((i + 1 for i, t in enumerate(row) if t in ends), len(row))] for row in greedy]
    assert min(map(len, expected)) < 18
    assert eqx_moe.generate(model, PROMPTS, max_new_tokens=18, eos_ids=sorted(ends)) == expected
    assert list(eqx_moe.stream(model, PROMPTS[0], max_new_tokens=18, eos_ids=sorted(ends))) == expected[0]
    ending = dataclasses.replace(model, generation_config=GenerationConfig(eos_token_id=tuple(sorted(ends))))
    assert eqx_moe.generate(ending, PROMPTS, max_new_tokens=18) == expected


def test_arrays_of_prompts(model, greedy):
    prompts = np.asarray([PROMPTS[0], PROMPTS[0]])
    assert eqx_moe.generate(model, jnp.asarray(prompts)[None], max_new_tokens=18) == [greedy[0]] * 2
    assert eqx_moe.generate(model, prompts[0], max_new_tokens=18) == [greedy[0]]


@pytest.mark.parametrize("case", [MIXTRAL[3], LLAMA[0], DEEPSEEK_V3[0]], ids=str)
def test_the_last_place_alone_is_that_of_all(case):
    """Its hidden state, the whole cache, what the routers decided there; and less is computed."""
    model, tokens = draw(case.parsed), jnp.asarray([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])
    segments = jnp.ones_like(tokens).at[0, :3].set(0)

    def run(last_only):
        run = eqx.filter_jit(lambda cache: model.forward(tokens, None, segments, cache, last_only=last_only))
        cache = model.init_cache(2, 9)
        return run(cache), run.lower(cache).compile().compiled.cost_analysis()["flops"]

    (last, less), (every, flops) = run(True), run(False)
    np.testing.assert_allclose(last.hidden, every.hidden[:, -1:], rtol=1e-5, atol=1e-5)
    assert eqx.tree_equal(last.cache, every.cache, rtol=1e-5, atol=1e-5)
    for name in ("logits", "choices", "weights"):
        for found, expected in zip(getattr(last.router, name), getattr(every.router, name), strict=True):
            np.testing.assert_allclose(found, expected[:, -1:], rtol=1e-5, atol=1e-5)
    for stats, choices in zip(last.router.stats, last.router.choices, strict=True):
        np.testing.assert_array_equal(
            stats.tokens_per_expert, np.bincount(choices.ravel(), minlength=stats.tokens_per_expert.size)
        )
    assert less < 0.96 * flops  # those of the CPU kernels are not among them


@pytest.mark.parametrize("form", [lambda model: model, eqx_moe.stack], ids=["layers", "stacked"])
def test_the_last_place_of_rows_in_two_axes(form):
    model, tokens = draw(MIXTRAL[3].parsed), jnp.asarray([[[3, 1, 4, 1, 5]], [[2, 7, 1, 8, 2]], [[1, 6, 1, 8, 0]]])
    every, last = model.forward(tokens), form(model).forward(tokens, last_only=True)
    assert last.hidden.shape == (3, 1, 1, every.hidden.shape[-1])
    np.testing.assert_allclose(last.hidden, every.hidden[..., -1:, :], rtol=1e-5, atol=1e-5)
    for found, expected in zip(last.router.weights, every.router.weights, strict=True):
        np.testing.assert_allclose(found, expected[..., -1:, :], rtol=1e-5, atol=1e-5)


def test_the_last_place_alone_competes_for_experts_as_among_all():
    """With a capacity an expert may be full before the last token comes."""
    model = draw(dataclasses.replace(MIXTRAL[0].parsed, num_hidden_layers=1))
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 53, (7, 16)))
    for factor in (0.2, 1.0):
        each = eqx_moe.with_options(model, execution=Capacity(factor=factor))
        every = each.forward(tokens)
        last = each.forward(tokens, last_only=True)
        np.testing.assert_allclose(last.hidden, every.hidden[:, -1:], rtol=1e-5, atol=1e-5)
        assert int(last.router.drops[0]) == int(every.router.drops[0]) > 0
    dropless = ExpertParallel(jax.make_mesh((1,), ("expert",)))
    assert not dropless.by_row
    assert dataclasses.replace(dropless, inner=Capacity()).by_row
    assert dataclasses.replace(dropless, method="all_to_all", factor=1.5).by_row


@pytest.mark.parametrize("family", [eqx_moe.MixtralConfig, eqx_moe.LlamaConfig], ids=["mixtral", "llama"])
def test_decoding_copies_no_weights(family):
    """What a step takes beside its arguments is less than any matrix of the model, head and embedding among them.

    It is so wide that XLA's own product of a row and a matrix would copy the matrix (see `eqx_moe.kernels.linear`).
    """
    sizes = dict(hidden_size=4608, intermediate_size=200, num_hidden_layers=1, num_attention_heads=8, head_dim=48)
    model = eqx_moe.init(family(vocab_size=520, num_key_value_heads=4, **sizes), key=jax.random.key(0))

    def step(model, cache, token):
        out = model.forward(token, cache=cache, last_only=True)
        return out.cache, jnp.argmax(model.unembed(out.hidden[:, -1]), axis=-1)

    given = model, model.init_cache(1, 24), jnp.asarray([[7]])
    memory = eqx.filter_jit(step, donate="all-except-first").lower(*given).compile().compiled.memory_analysis()
    smallest = min(leaf.nbytes for leaf in jax.tree.leaves(model) if leaf.size > 8 * 4608)
    assert memory.temp_size_in_bytes < smallest / 2, (memory.temp_size_in_bytes, smallest)


@pytest.mark.parametrize("segments", [None, jnp.ones((1, 5), int)], ids=["one segment", "segments"])
def test_rotary_tables_are_computed_once(segments):
    """And not in every product with them, for every head of every layer."""
    model, tokens = draw(LLAMA[0].parsed), jnp.asarray([[3, 1, 4, 1, 5]])
    compiled = eqx.filter_jit(lambda model, segments: model(tokens, None, segments)).lower(model, segments).compile()
    assert compiled.compiled.as_text().count(" cosine(") == 1 < model.depth


def test_few_shapes_compile(model, monkeypatch):
    traces = []
    plain = decode._next
    monkeypatch.setattr(decode, "_next", lambda *args: traces.append(args[2].shape) or plain(*args))
    monkeypatch.setattr(decode, "_generate", eqx.filter_jit(decode._generate.__wrapped__))
    for length in (1, 5, 13, 16):
        for new in (1, 7, 15):
            for temperature in (0.5, 0.9):
                eqx_moe.generate(model, [[3] * length], max_new_tokens=new, temperature=temperature, seed=length)
    assert len(traces) == 2  # prefill and the loop's body, once
    assert [decode._bucket(n) for n in (1, 16, 17, 24, 25, 33, 48, 49, 100)] == [16, 16, 24, 24, 32, 48, 48, 64, 128]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompts=[]), "at least one prompt"),
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[[1, 53]]), r"\[0, 53\).*prompt 0 has 53"),
        (dict(prompts=[[-1, 3]]), r"prompt 0 has -1"),
        (dict(prompts=[[1]], max_new_tokens=0), "`max_new_tokens` must be at least 1; got 0"),
        (dict(prompts=[[1]], max_new_tokens=-3), "got -3"),
        (dict(prompts=[[1] * 90], max_new_tokens=7), "96 positions; prompt 0 has 90 tokens, and max_new_tokens=7"),
        (dict(prompts=[[1]], temperature=-0.1), "`temperature`.*-0.1"),
        (dict(prompts=[[1]], temperature=float("nan")), "`temperature`.*nan"),
        (dict(prompts=[[1]], temperature=1.0, top_k=0), "`top_k`.*0"),
        (dict(prompts=[[1]], temperature=1.0, top_p=0.0), "`top_p`.*0.0"),
        (dict(prompts=[[1]], temperature=1.0, top_p=1.5), "`top_p`.*1.5"),
        (dict(prompts=[[1]], eos_ids=[99]), r"`eos_ids`.*\[0, 53\).*99"),
    ],
)
def test_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        eqx_moe.generate(model, **options)
    if len(prompts := options.pop("prompts")) == 1:
        with pytest.raises(ValueError, match=message):
            eqx_moe.stream(model, prompts[0], **options)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (np.zeros((3, 0), int), "prompt 0 is empty"),
        (np.zeros((0, 4), int), "at least one prompt"),
        ([[1.5]], "list of token ids"),
        ([["a"]], "list of token ids"),
        (jnp.ones((2, 3)), "array of token ids"),
    ],
)
def test_what_is_no_token_id(model, prompts, message):
    """Below the public functions, whose types are checked before they could say it."""
    with pytest.raises(ValueError, match=message):
        decode._checked(model, prompts, 4)


def test_counts_are_integers(model):
    for bad in (3.5, True):
        with pytest.raises(ValueError, match=f"`max_new_tokens` must be an integer; got {bad}"):
            decode._checked(model, [[1]], bad)


def test_a_prompt_may_fill_all_positions(model):
    assert len(eqx_moe.generate(model, [[1] * 90], max_new_tokens=6)[0]) == 6


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.6), (4, 0.7), (1, 0.9), (None, 1.0)])
def test_draws_follow_the_distribution(top_k, top_p):
    """Frequencies against the probabilities computed the plain way."""
    logits = np.asarray([1.0, 3.0, 0.5, 2.5, -1.0, 2.5, 0.0])
    temperature = 0.7
    order = np.argsort(-logits, kind="stable")
    kept = order[:top_k]
    if top_p is not None:
        weights = np.exp(logits[kept] / temperature)
        before = np.cumsum(weights / weights.sum()) - weights / weights.sum()
        kept = kept[before < top_p]
    expected = np.zeros(7)
    expected[kept] = np.exp(logits[kept] / temperature)
    expected /= expected.sum()

    draws = 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    ids = choose(
        jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, 7)), Sampling(temperature, top_k, top_p), keys
    )
    found = np.bincount(np.asarray(ids), minlength=7) / draws
    assert not found[expected == 0].any()
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / draws))
