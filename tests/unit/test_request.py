"""Requests, their sequences and their tokens."""

from __future__ import annotations

import random
from dataclasses import MISSING, fields, is_dataclass

import pytest
from unit_helpers import error_of

from folovllm import Request, RequestStatus, SamplingParams, Sequence, SequenceData, SequenceStatus

STATUSES = {
    "WAITING": ("waiting", False),
    "RUNNING": ("running", False),
    "SWAPPED": ("swapped", False),
    "FINISHED_STOPPED": ("finished_stopped", True),
    "FINISHED_LENGTH_CAPPED": ("finished_length_capped", True),
    "FINISHED_ABORTED": ("finished_aborted", True),
    "FINISHED_IGNORED": ("finished_ignored", True),
}
OF_A_REQUEST = {name: entry for name, entry in STATUSES.items() if name != "FINISHED_IGNORED"}


def make_sequence(prompt=(1, 2, 3), output=(), **kwargs) -> Sequence:
    return Sequence("r-0", "r", SequenceData(list(prompt), list(output)), SamplingParams(), **kwargs)


def make_request(prompt_token_ids=(1, 2, 3), **params) -> Request:
    return Request("r", "some text", list(prompt_token_ids), SamplingParams(**params))


@pytest.mark.parametrize("kind, expected", [(SequenceStatus, STATUSES), (RequestStatus, OF_A_REQUEST)])
class TestStatuses:
    def test_names_values_and_which_are_finished(self, kind, expected):
        assert {status.name: (status.value, status.is_finished()) for status in kind} == expected

    def test_is_finished_gives_a_bool(self, kind, expected):
        assert all(type(status.is_finished()) is bool for status in kind)


class TestSequenceStatus:
    def test_a_sequence_of_best_of_can_be_ignored(self):
        assert SequenceStatus.FINISHED_IGNORED.is_finished()


class TestRequestStatus:
    def test_a_request_cannot_be_ignored(self):
        assert not hasattr(RequestStatus, "FINISHED_IGNORED")


class TestSequenceData:
    def test_before_anything_is_generated(self):
        data = SequenceData([5, 6, 7])
        assert is_dataclass(data)
        assert data.prompt_token_ids == [5, 6, 7] and data.output_token_ids == []
        assert (data.get_len(), data.get_prompt_len(), data.get_output_len()) == (3, 3, 0)
        assert data.get_token_ids() == [5, 6, 7]
        assert data.get_last_token_id() == 7  # the prompt's

    def test_with_output(self):
        data = SequenceData([5, 6, 7], [8, 9])
        assert (data.get_len(), data.get_prompt_len(), data.get_output_len()) == (5, 3, 2)
        assert data.get_token_ids() == [5, 6, 7, 8, 9]
        assert data.get_last_token_id() == 9

    def test_add_token_id(self):
        data = SequenceData([5])
        for length, token_id in enumerate([0, 8, 8], 1):
            data.add_token_id(token_id)
            assert data.get_last_token_id() == token_id
            assert data.get_output_len() == length
        assert data.prompt_token_ids == [5] and data.output_token_ids == [0, 8, 8]

    def test_log_probabilities_add_up(self):
        data = SequenceData([5])
        assert data.cumulative_logprob is None
        data.add_token_id(1, -0.5)
        data.add_token_id(2, -0.25)
        assert data.cumulative_logprob == -0.75

    def test_a_certain_token_has_been_reported_too(self):
        data = SequenceData([5])
        data.add_token_id(1, 0.0)
        assert data.cumulative_logprob == 0.0

    def test_where_all_are_dropped_nothing_has_been_reported(self):
        data = SequenceData([5])
        data.add_token_id(1, -0.5)
        data.drop_newest(1)
        assert data.cumulative_logprob is None

    def test_two_share_no_default_list(self):
        a, b = SequenceData([1]), SequenceData([1])
        a.add_token_id(2)
        assert b.output_token_ids == []

    def test_the_lists_are_its_own(self):
        prompt, output = [1, 2], [3]
        data = SequenceData(prompt, output)
        prompt.append(9)
        output.append(9)
        data.get_token_ids().append(9)
        assert data.get_token_ids() == [1, 2, 3]

    def test_an_empty_prompt_has_no_last_token(self):
        assert "prompt" in error_of(SequenceData, [])

    @pytest.mark.parametrize("bad", [-1, 1.5, "1", True, None])
    @pytest.mark.parametrize("field", ["prompt_token_ids", "output_token_ids"])
    def test_tokens_are_token_ids(self, field, bad):
        assert field in error_of(SequenceData, **{"prompt_token_ids": [1], field: [1, bad]})


class TestSequence:
    def test_defaults(self):
        seq = make_sequence()
        assert is_dataclass(seq)
        assert (seq.seq_id, seq.request_id) == ("r-0", "r")
        assert seq.status is SequenceStatus.WAITING
        assert seq.block_ids == []
        assert seq.block_ids is not make_sequence().block_ids

    @pytest.mark.parametrize(
        "method", ["get_len", "get_prompt_len", "get_output_len", "get_token_ids", "get_last_token_id"]
    )
    @pytest.mark.parametrize("output", [[], [8, 9]])
    def test_reads_its_data(self, method, output):
        seq = make_sequence(output=output)
        assert getattr(seq, method)() == getattr(seq.data, method)()

    def test_writes_its_data(self):
        seq = make_sequence()
        seq.add_token_id(7, -0.5)
        assert seq.data.output_token_ids == [7] and seq.data.cumulative_logprob == -0.5

    @pytest.mark.parametrize("status", SequenceStatus)
    def test_is_finished_when_its_status_is(self, status):
        assert make_sequence(status=status).is_finished() is status.is_finished()


class TestFork:
    @pytest.mark.parametrize("status", SequenceStatus)
    def test_same_request_params_status_and_past(self, status):
        parent = make_sequence(output=[4, 5], status=status, block_ids=[10, 11])
        child = parent.fork("r-1")
        assert child.seq_id == "r-1" and parent.seq_id == "r-0"
        assert child.request_id == parent.request_id
        assert child.sampling_params is parent.sampling_params
        assert child.status is status
        assert child.data == parent.data
        assert child.block_ids == [10, 11]

    def test_its_own_lists(self):
        parent = make_sequence(output=[4], block_ids=[10])
        child = parent.fork("r-1")
        child.add_token_id(6)
        child.block_ids.append(12)
        child.data.prompt_token_ids.append(0)
        parent.add_token_id(7)
        assert parent.data == SequenceData([1, 2, 3], [4, 7]) and parent.block_ids == [10]
        assert child.data == SequenceData([1, 2, 3, 0], [4, 6]) and child.block_ids == [10, 12]

    def test_its_own_future_and_the_parents_log_probabilities_so_far(self):
        parent = make_sequence()
        parent.add_token_id(4, -1.0)
        parent.logprobs.append({4: None})
        child = parent.fork("r-1")
        child.add_token_id(5, -2.0)
        child.logprobs.append({5: None})
        assert child.data.cumulative_logprob == -3.0 and len(child.logprobs) == 2
        assert parent.data.cumulative_logprob == -1.0 and len(parent.logprobs) == 1

    def test_dropping_tokens_of_one_changes_no_sum_of_the_other(self):
        parent = make_sequence()
        parent.add_token_id(4, -1.0)
        child = parent.fork("r-1")
        parent.add_token_id(5, -2.0)
        child.add_token_id(6, -5.0)
        child.truncate_output(1)
        parent.add_token_id(7, -1.0)
        parent.truncate_output(2)
        assert (child.data.cumulative_logprob, parent.data.cumulative_logprob) == (-1.0, -3.0)

    def test_it_guesses_at_once(self):
        parent = make_sequence()
        parent.next_guess = 70
        assert parent.fork("r-1").next_guess == 0

    def test_the_status_goes_its_own_way(self):
        parent = make_sequence()
        child = parent.fork("r-1")
        parent.status = SequenceStatus.FINISHED_ABORTED
        assert child.status is SequenceStatus.WAITING

    def test_a_fork_can_be_forked(self):
        grandchild = make_sequence(output=[4]).fork("r-1").fork("r-2")
        assert grandchild.seq_id == "r-2" and grandchild.get_token_ids() == [1, 2, 3, 4]


class TestRequest:
    def test_fields_come_in_the_contracts_order(self):
        assert [f.name for f in fields(Request)][:7] == [
            "request_id",
            "prompt",
            "prompt_token_ids",
            "sampling_params",
            "arrival_time",
            "sequences",
            "status",
        ]

    def test_what_it_is_made_of(self):
        params = SamplingParams()
        request = Request("r", "some text", [1, 2, 3], params)
        assert (request.request_id, request.prompt, request.prompt_token_ids) == ("r", "some text", [1, 2, 3])
        assert request.sampling_params is params
        assert request.status is RequestStatus.WAITING

    def test_arrival_time_is_taken_anew_for_each_request(self):
        (field,) = (f for f in fields(Request) if f.name == "arrival_time")
        assert field.default is MISSING and field.default_factory is not MISSING
        assert isinstance(make_request().arrival_time, float)
        assert Request("r", "t", [1], SamplingParams(), 12.5).arrival_time == 12.5

    @pytest.mark.parametrize("params, count", [({}, 1), ({"n": 3}, 3), ({"n": 2, "best_of": 4}, 4)])
    def test_makes_best_of_sequences(self, params, count):
        request = make_request(**params)
        ids = [f"r-{i}" for i in range(count)]
        assert list(request.sequences) == ids
        assert [seq.seq_id for seq in request.get_seqs()] == ids
        for seq in request.get_seqs():
            assert seq.request_id == "r"
            assert seq.sampling_params is request.sampling_params
            assert seq.status is SequenceStatus.WAITING
            assert seq.data == SequenceData([1, 2, 3])

    def test_each_sequence_has_a_prompt_of_its_own(self):
        request = make_request(n=2)
        request.sequences["r-0"].data.prompt_token_ids.append(9)
        assert request.sequences["r-1"].get_token_ids() == [1, 2, 3]
        assert request.prompt_token_ids == [1, 2, 3]

    def test_two_requests_share_no_sequences(self):
        assert make_request().sequences is not make_request().sequences

    def test_keeps_the_sequences_it_is_given(self):
        seq = make_sequence()
        request = Request("r", "t", [1, 2, 3], SamplingParams(n=3), sequences={"mine": seq})
        assert request.sequences == {"mine": seq}

    def test_get_seqs_by_status(self):
        request = make_request(n=3)
        a, b, c = request.get_seqs()
        b.status = SequenceStatus.RUNNING
        assert request.get_seqs(SequenceStatus.RUNNING) == [b]
        assert request.get_seqs(SequenceStatus.WAITING) == [a, c]
        assert request.get_seqs(SequenceStatus.SWAPPED) == []
        assert (request.get_num_seqs(), request.get_num_seqs(SequenceStatus.WAITING)) == (3, 2)
        assert request.get_num_seqs(SequenceStatus.SWAPPED) == 0

    @pytest.mark.parametrize("last", [status for status in SequenceStatus if status.is_finished()])
    def test_is_finished_when_all_sequences_are(self, last):
        request = make_request(n=2)
        a, b = request.get_seqs()
        assert not request.is_finished()
        a.status = SequenceStatus.FINISHED_STOPPED
        assert not request.is_finished()
        b.status = last
        assert request.is_finished()

    def test_an_empty_prompt_is_refused(self):
        assert "prompt" in error_of(make_request, [])

    def test_an_empty_prompt_is_refused_with_sequences_too(self):
        assert "prompt" in error_of(Request, "r", "", [], SamplingParams(), sequences={"r-0": make_sequence()})

    @pytest.mark.parametrize("bad", [-1, 1.5, "1", True])
    def test_a_prompt_is_token_ids(self, bad):
        assert "prompt_token_ids" in error_of(make_request, [1, bad])

    def test_a_prompt_may_come_as_token_ids_alone(self):
        assert Request("r", None, [1], SamplingParams()).get_seqs()[0].get_token_ids() == [1]

    def test_its_prompt_is_a_copy(self):
        prompt = [1, 2]
        request = Request("r", "t", prompt, SamplingParams())
        prompt.append(3)
        assert request.prompt_token_ids == request.get_seqs()[0].get_token_ids() == [1, 2]


class TestPendingAnswers:
    def test_they_become_sequences_one_by_one(self):
        request = Request("r", None, [1, 2], SamplingParams(n=3), num_pending=3, cache_salt="salt")
        assert request.get_num_seqs() == 0 and not request.is_finished()
        first = request.start_answer()
        first.num_computed_tokens, first.block_ids = 2, [7]
        second, third = request.start_answer(first), request.start_answer()
        assert [seq.seq_id for seq in request.get_seqs()] == ["r-0", "r-1", "r-2"] and request.num_pending == 0
        assert [seq.index for seq in request.get_seqs()] == [0, 1, 2]
        assert (second.block_ids, second.num_computed_tokens) == ([7], 2)  # a fork
        assert (third.block_ids, third.num_computed_tokens) == ([], 0)
        assert {seq.cache_salt for seq in request.get_seqs()} == {"salt"}

    def test_a_request_with_pending_answers_is_not_finished(self):
        request = Request("r", None, [1], SamplingParams(n=2), num_pending=2)
        request.start_answer().status = SequenceStatus.FINISHED_STOPPED
        assert not request.is_finished()
        request.start_answer().status = SequenceStatus.FINISHED_STOPPED
        assert request.is_finished()

    def test_a_fork_has_random_numbers_and_preemptions_of_its_own(self):
        request = Request("r", None, [1], SamplingParams(n=2), num_pending=2)
        first = request.start_answer()
        first.generator, first.num_preemptions = random.Random(0), 2
        second = request.start_answer(first)
        assert second.generator is None and second.num_preemptions == 0
