// The simulation's copies: a few bytes at a time, and everybody else moves in between.
//
// Linked in the place of core/memory/copy_pool.cpp.
#include "memory/copy_pool.hpp"

#include <algorithm>
#include <cstring>

#include "kernel.hpp"
#include "model.hpp"

namespace refit {
namespace {

constexpr std::uint64_t kPieceBytesMin = 32;
/// A large copy takes long enough for its trainer to lose patience and for others to come and go.
constexpr std::uint64_t kLargeRunBytes = 4096;
constexpr std::uint64_t kPiecesPerRun = 4;
constexpr std::uint64_t kPiecesPerLargeRun = 24;
constexpr std::uint64_t kLargePieceUsMax = 20;

void copy_piece(std::byte* target, const std::byte* source, std::uint64_t bytes) {
  sim::turn();
  auto& kernel = sim::kernel();
  if (bytes >= kLargeRunBytes) kernel.sleep(kernel.chance.us(0, kLargePieceUsMax));
  if (sim::dying()) return;
  std::memcpy(target, source, bytes);
  sim::Model::current().on_bytes();
}

/// Calls `piece(target, source, bytes)` for all of an op.
template <typename Piece>
void for_each_piece(const CopyOp& op, Piece&& piece) {
  const std::uint64_t runs = op.run_count();
  const std::uint64_t pieces = op.run_bytes >= kLargeRunBytes ? kPiecesPerLargeRun
                               : op.loop_count == 0           ? kPiecesPerRun
                                                              : 1;
  const std::uint64_t step =
      std::max((op.run_bytes / pieces + 7) / 8 * 8, std::min(op.run_bytes, kPieceBytesMin));
  for (std::uint64_t run = 0; run < runs; ++run) {
    const auto [source, target] = op.ends_of(run, op.loop_count);
    for (std::uint64_t done = 0; done < op.run_bytes; done += step) {
      piece(target + done, source + done, std::min(step, op.run_bytes - done));
    }
  }
}

struct Piece {
  std::byte* target;
  const std::byte* source;
  std::uint64_t bytes;
};

std::vector<Piece> pieces_of(const CopyOp* ops, std::size_t count) {
  std::vector<Piece> pieces;
  for (std::size_t i = 0; i < count; ++i) {
    for_each_piece(ops[i], [&](std::byte* target, const std::byte* source, std::uint64_t bytes) {
      pieces.push_back({target, source, bytes});
    });
  }
  return pieces;
}

void copy_all(const CopyOp* ops, std::size_t count) {
  std::vector<Piece> pieces = pieces_of(ops, count);
  if (pieces.empty()) return;
  std::size_t now = pieces.size();
  if (sim::planted("copy.done_before_the_last_byte")) {
    // Says that it is through while one piece is still on its way.
    --now;
    auto& kernel = sim::kernel();
    kernel.spawn(kernel.self(), [piece = pieces.back()] {
      for (int i = 0; i < 20; ++i) sim::give_way();
      copy_piece(piece.target, piece.source, piece.bytes);
    });
  }
  for (std::size_t i = 0; i < now; ++i)
    copy_piece(pieces[i].target, pieces[i].source, pieces[i].bytes);
}

}  // namespace

CopyOutcome copy_inline(const CopyOp* ops, std::size_t count) noexcept {
  copy_all(ops, count);
  return {};
}

void CopyJob::prepare(const CopyOp* ops, std::size_t count, std::uint64_t) {
  ops_ = ops;
  chunks_.clear();
  bytes_ = 0;
  for (std::size_t i = 0; i < count; ++i) {
    REFIT_ASSERT(ops[i].cast == Cast::none);  // Its models have one dtype.
    chunks_.push_back({static_cast<std::uint32_t>(i), 0, ops[i].bytes()});
    bytes_ += ops[i].bytes();
  }
}

Result<std::unique_ptr<CopyPool>> CopyPool::create(unsigned threads) {
  std::unique_ptr<CopyPool> pool(new CopyPool);
  REFIT_TRY(pool->start(threads));
  return pool;
}

/// Each thread is a fiber of the daemon, which the caller is one of.
Result<void> CopyPool::start(unsigned threads) {
  auto& kernel = sim::kernel();
  beats_ = std::make_unique<Heartbeat[]>(threads);
  for (unsigned i = 0; i < threads; ++i)
    kernel.spawn(kernel.self(), [this, i] { serve(beats_[i]); });
  return {};
}

CopyPool::~CopyPool() = default;

void CopyPool::submit(CopyJob& job) noexcept {
  job.next_ = nullptr;
  (last_ == nullptr ? first_ : last_->next_) = &job;
  last_ = &job;
}

void CopyPool::serve(Heartbeat&) noexcept {
  auto& kernel = sim::kernel();
  for (;;) {
    if (!kernel.wait([this] { return first_ != nullptr; })) return;
    CopyJob& job = *first_;
    first_ = job.next_;
    if (first_ == nullptr) last_ = nullptr;
    copy_all(job.ops_, job.chunks_.size());
    if (kernel.dying()) return;
    job.done_(job.done_context_, {});
  }
}

}  // namespace refit
