// What a word that both peers see is made of. Sequentially consistent loads and stores are all that
// anybody may do with it.
//
// One alias, so that the simulation can build the same code over words that hand the turn to
// another actor at every access (tests/sim/twin/ipc/shared_word.hpp).
#pragma once

#include <atomic>

namespace refit {

template <typename T>
using SharedWord = std::atomic<T>;

}  // namespace refit
