"""Translation from English: newstest2014."""

from radargate_pl.benchmarks.declaration import Benchmark, HubLayout

METRICS = ("bleu", "chrf", "sentence_chrf_accuracy")


def _wmt14(language: str, name: str, config: str) -> Benchmark:
    """The hub has the pairs the other way round; prompt and stop string are those of lm-evaluation-harness."""
    return Benchmark(
        name=f"wmt14_en_{language}",
        group="WMT14",
        paper_name=f"EN-{language.upper()}",
        prompt=f"English phrase: {{source}}\n{name} phrase:",
        answer_format="translation",
        protocol="generation",
        metrics=METRICS,
        max_new_tokens=256,
        hub=HubLayout(
            dataset="wmt/wmt14",
            configs=(config,),
            split="test",
            inputs={"source": "translation.en"},
            answer=f"translation.{language}",
            answer_is="text",
            checked="data set and columns: the task files of lm-evaluation-harness, for French; not these pairs",
        ),
        citation="Bojar et al. 2014, Findings of the 2014 Workshop on Statistical Machine Translation",
    )


WMT14 = (_wmt14("cs", "Czech", "cs-en"), _wmt14("ru", "Russian", "ru-en"), _wmt14("de", "German", "de-en"))
