#include "schedule.h"

namespace softclip {
namespace {

int64_t boundary(int64_t length, int groups, int group) { return length * group / groups; }

}  // namespace

// A round-robin tournament needs an even number of groups, two for every thread.
Schedule::Schedule(int64_t rows, int64_t columns, int threads, bool mirrored)
    : rows_(rows),
      columns_(columns),
      threads_(threads),
      mirrored_(mirrored),
      groups_(mirrored && threads > 1 ? 2 * threads : threads) {}

// Mirrored: one round of each group with itself, then groups - 1 rounds of the tournament. Otherwise a Latin square.
int Schedule::rounds() const { return groups_; }

Range Schedule::rows(int group) const { return {boundary(rows_, groups_, group), boundary(rows_, groups_, group + 1)}; }

Range Schedule::columns(int group) const {
  return {boundary(columns_, groups_, group), boundary(columns_, groups_, group + 1)};
}

int64_t Schedule::most_rows() const { return (rows_ + groups_ - 1) / groups_; }

int64_t Schedule::most_columns() const { return (columns_ + groups_ - 1) / groups_; }

Range Schedule::own_groups(int thread) const {
  return {boundary(groups_, threads_, thread), boundary(groups_, threads_, thread + 1)};
}

Range Schedule::own_rows(int thread) const {
  return {boundary(rows_, threads_, thread), boundary(rows_, threads_, thread + 1)};
}

Range Schedule::own_columns(int thread) const {
  return {boundary(columns_, threads_, thread), boundary(columns_, threads_, thread + 1)};
}

Job Schedule::between(int row_group, int column_group) const {
  const Range rows = this->rows(row_group), columns = this->columns(column_group);
  const bool triangle = mirrored_ && row_group == column_group;
  return {rows.begin, rows.end, columns.begin, columns.end, triangle, row_group, column_group};
}

std::vector<Job> Schedule::jobs(int round, int thread) const {
  if (!mirrored_) return {between(thread, (thread + round) % groups_)};
  if (groups_ == 1) return {between(0, 0)};
  if (round == 0) return {between(2 * thread, 2 * thread), between(2 * thread + 1, 2 * thread + 1)};
  // The circle method: one group stays, the others move on by one place each round.
  const int others = groups_ - 1, turn = round - 1;
  if (thread == 0) return {between(turn, others)};
  return {between((turn + thread) % others, (turn - thread + others) % others)};
}

}  // namespace softclip
