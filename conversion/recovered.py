"""What conversions of one model had lost after recovery, for the command line to quote: the table of docs/recovery.md.
Nothing is known of another model before it is measured."""

MODEL = "SmolLM2-135M-Instruct"
# Points of accuracy lost over seven multiple-choice sets, and their standard error, of each run: by the cache in % of
# the original's, and by millions of tokens of training.
POINTS_LOST: dict[float, dict[int, list[tuple[float, float]]]] = {
    31.25: {20: [(0.79, 0.38)], 78: [(0.46, 0.37), (0.80, 0.38)]},
    18.75: {20: [(2.04, 0.45)], 78: [(0.99, 0.42)]},
    12.5: {20: [(3.09, 0.51)], 78: [(1.93, 0.46)]},
}
