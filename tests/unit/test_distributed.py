"""Errors of a process group: which of them mean that another process is lost."""

import pytest

from std_fast.runtime.distributed import is_peer_lost

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        (f"{GLOO}pair.cc:534] Connection closed by peer [127.0.0.1]:43689", True),
        (f"{GLOO}pair.cc:538] Read error [127.0.0.1]:9: Connection reset by peer", True),
        (f"{GLOO}unbound_buffer.cc:81] Timed out waiting 4000ms for recv operation to complete", True),
        (f"{GLOO}pair.cc:280] Application timeout caused pair closure", True),
        (f"{GLOO}pair.cc:446] writev [127.0.0.1]:9: Broken pipe", True),
        ("CUDA error: peer access is not supported between these two devices", False),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", False),
    ],
)
def test_a_lost_peer_is_told_from_other_errors(message, lost):
    assert is_peer_lost(RuntimeError(message)) == lost
