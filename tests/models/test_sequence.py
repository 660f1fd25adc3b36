import torch
from hypothesis import given
from hypothesis import strategies as st

from evatok.models.sequence import IGNORED, NO_CLASS, Vocabulary, pack, read_sequence, write_sequences

VOCABULARY = Vocabulary(codes=10, choices=(1, 2, 4), classes=3)


def test_sequence_is_class_then_each_block_behind_its_length_token():
    tokens, sizes = write_sequences(
        VOCABULARY,
        torch.tensor([2, NO_CLASS]),
        torch.tensor([5, 6, 7, 8, 9, 0]),
        torch.tensor([[1, 2], [2, 1]]),
    )
    assert sizes.tolist() == [6, 6]
    # Codes 0-9, then [len 1] 10, [len 2] 11, [len 4] 12, then classes 13-15 and the null class 16.
    assert tokens.tolist() == [15, 10, 5, 11, 6, 7, 16, 11, 8, 9, 10, 0]


def test_packing_shifts_targets_and_restarts_positions_in_every_sequence():
    batch = pack(VOCABULARY, torch.tensor([0, 1]), torch.tensor([5, 6, 7]), torch.tensor([[1], [2]]))
    assert batch.tokens.tolist() == [13, 10, 14, 11, 6]
    assert batch.targets.tolist() == [10, 5, 11, 6, 7]
    assert batch.positions.tolist() == [0, 1, 0, 1, 2]
    assert batch.lengths.tolist() == [2, 3]


def test_condition_stands_behind_the_class_and_is_not_predicted():
    batch = pack(
        VOCABULARY,
        torch.tensor([NO_CLASS]),
        torch.tensor([5, 6]),
        torch.tensor([[1, 1]]),
        condition=torch.tensor([[1, 2, 3]]),
    )
    assert batch.tokens.tolist() == [16, 1, 2, 3, 10, 5, 10]
    assert batch.targets.tolist() == [IGNORED, IGNORED, IGNORED, 10, 5, 10, 6]


@given(
    st.lists(st.lists(st.sampled_from(VOCABULARY.choices), min_size=3, max_size=3), min_size=1, max_size=5),
    st.integers(0, 4),
    st.randoms(use_true_random=False),
)
def test_sequences_read_back_to_what_was_written(assignment, prefix, random):
    lengths = torch.tensor(assignment)
    indices = torch.tensor([random.randrange(10) for _ in range(int(lengths.sum()))])
    condition = torch.randint(10, (len(lengths), prefix))
    tokens, sizes = write_sequences(VOCABULARY, torch.zeros(len(lengths)).long(), indices, lengths, condition)
    codes, counts = zip(
        *(read_sequence(VOCABULARY, piece[1 + prefix :]) for piece in tokens.split(sizes.tolist()))
    )
    assert torch.equal(torch.cat(codes), indices)
    assert torch.equal(torch.stack(counts), lengths)
