"""Word problems whose solution is written out: GSM8K and MATH."""

from radargate_pl.benchmarks.declaration import Benchmark, HubLayout

SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra"),
    "precalculus",
)
HARNESS = "the task files of lm-evaluation-harness"

MATHEMATICS = (
    Benchmark(
        name="gsm8k",
        group="GSM8K",
        paper_name="GSM8K",
        prompt="Question: {question}\nAnswer:",  # of lm-evaluation-harness
        answer_format="number",
        protocol="generation",
        metrics=("accuracy",),
        stop=("Question:", "</s>", "<|im_end|>"),
        max_new_tokens=512,  # of the paper
        hub=HubLayout(
            dataset="openai/gsm8k",
            configs=("main",),
            split="test",
            inputs={"question": "question"},
            answer="answer",
            answer_is="number",
            checked=HARNESS,
        ),
        citation="Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems",
    ),
    Benchmark(
        name="math",
        group="MATH",
        paper_name="MATH",
        prompt="Problem:\n{problem}\n\nSolution:",  # of Minerva
        answer_format="math",
        protocol="generation",
        metrics=("accuracy",),
        stop=("Problem:",),
        max_new_tokens=512,  # of the paper
        hub=HubLayout(
            dataset="EleutherAI/hendrycks_math",
            configs=SUBJECTS,
            split="test",
            inputs={"problem": "problem"},
            answer="solution",
            answer_is="boxed",
            checked=HARNESS,
        ),
        citation="Hendrycks et al. 2021, Measuring Mathematical Problem Solving With the MATH Dataset",
    ),
)
