//! The first meeting with a host that is not known yet: waits for it, shows the code, pins
//! it when a person has confirmed.

use super::{Host, lock, refused};
use crate::api::links::{MeetRequest, MeetingState, MeetingStatus};
use crate::api::types::{ApiError, Done, LinkConfig};
use crate::pool::HostName;
use interconnect::identity::code::Code;
use interconnect::identity::meeting::{self, Met};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a meeting waits for the partner and for a person.
const MEETING_PATIENCE: Duration = Duration::from_secs(600);

/// A meeting, under way or over.
pub(super) struct Meeting {
    request: MeetRequest,
    until: Instant,
    state: Mutex<State>,
    task: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

#[derive(Clone)]
enum State {
    /// Nobody has come; why not, as far as known.
    Waiting(Option<String>),
    /// Somebody has, and shows this code if nobody stands between.
    Came(HostName, Met),
    /// It is pinned.
    Pinned(HostName, Met),
    /// It is over.
    Failed(String),
}

impl Drop for Meeting {
    fn drop(&mut self) {
        if let Some(task) = lock(&self.task).take() {
            task.abort();
        }
    }
}

impl Meeting {
    /// The state, after looking at the clock.
    fn state(&self) -> State {
        let mut state = lock(&self.state);
        if matches!(*state, State::Waiting(_) | State::Came(..)) && Instant::now() >= self.until {
            if let Some(task) = lock(&self.task).take() {
                task.abort();
            }
            *state = State::Failed(format!(
                "nobody came, or nobody confirmed the code, within {} minutes; begin again on both hosts",
                MEETING_PATIENCE.as_secs() / 60
            ));
        }
        state.clone()
    }

    fn status(&self) -> MeetingStatus {
        let left = self.until.saturating_duration_since(Instant::now());
        let mut status = MeetingStatus {
            state: MeetingState::Waiting,
            links: self.request.links.clone(),
            partner: None,
            fingerprint: None,
            code: None,
            reason: None,
            left_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX),
        };
        match self.state() {
            State::Waiting(reason) => status.reason = reason,
            State::Failed(reason) => {
                status.state = MeetingState::Failed;
                status.reason = Some(reason);
            }
            ref state @ (State::Came(ref name, ref met) | State::Pinned(ref name, ref met)) => {
                status.state = if matches!(state, State::Came(..)) {
                    MeetingState::Code
                } else {
                    MeetingState::Pinned
                };
                status.partner = Some(name.clone());
                status.fingerprint = Some(met.fingerprint.to_string());
                status.code = Some(met.code.to_string());
            }
        }
        status
    }
}

impl Host {
    /// Wait for a host at these links' addresses. A meeting with the same links that is
    /// under way counts.
    ///
    /// # Errors
    /// If another one is under way, or there is no link.
    pub fn meet(self: &Arc<Self>, request: MeetRequest) -> Result<MeetingStatus, ApiError> {
        let Some(first) = request.links.first().copied() else {
            return Err(refused("give at least one link, as --link LOCAL=PEER"));
        };
        let mut slot = lock(&self.meeting);
        if let Some(there) = slot.as_ref()
            && matches!(there.state(), State::Waiting(_) | State::Came(..))
        {
            if there.request.links == request.links {
                return Ok(there.status());
            }
            return Err(refused(
                "this host waits for another partner already: finish that, or end it with `pollux link create --cancel`",
            ));
        }
        let meeting = Arc::new(Meeting {
            request,
            until: Instant::now() + MEETING_PATIENCE,
            state: Mutex::new(State::Waiting(None)),
            task: Mutex::default(),
        });
        let setup = meeting::Meeting {
            identity: Arc::clone(&lock(&self.identity)),
            me: self.env.config.name.to_string(),
            local: first.local,
            peer: first.peer,
        };
        let (here, weak) = (Arc::downgrade(self), Arc::downgrade(&meeting));
        let task = self.runtime.spawn(async move {
            let told = weak.clone();
            let met = setup
                .meet(move |reason| {
                    if let Some(meeting) = told.upgrade() {
                        *lock(&meeting.state) = State::Waiting(Some(reason));
                    }
                })
                .await;
            let (Some(host), Some(meeting)) = (here.upgrade(), weak.upgrade()) else {
                return;
            };
            let came = met.map_err(|e| e.to_string()).and_then(|met| {
                let name = HostName::new(met.name.clone()).map_err(|e| e.to_string())?;
                host.check_new_partner(&name).map_err(|e| e.to_string())?;
                Ok(State::Came(name, met))
            });
            *lock(&meeting.state) = came.unwrap_or_else(State::Failed);
        });
        *lock(&meeting.task) = Some(task);
        let status = meeting.status();
        *slot = Some(meeting);
        Ok(status)
    }

    fn the_meeting(&self) -> Result<Arc<Meeting>, ApiError> {
        lock(&self.meeting).clone().ok_or_else(|| {
            refused("this host waits for nobody; `pollux link create --link LOCAL=PEER` begins a meeting")
        })
    }

    /// How the newest meeting stands.
    ///
    /// # Errors
    /// If there was none.
    pub fn meeting_status(&self) -> Result<MeetingStatus, ApiError> {
        Ok(self.the_meeting()?.status())
    }

    /// End the meeting; nothing is pinned.
    ///
    /// # Errors
    /// If there is none under way.
    pub fn meeting_cancel(&self) -> Result<Done, ApiError> {
        let meeting = self.the_meeting()?;
        if !matches!(meeting.state(), State::Waiting(_) | State::Came(..)) {
            return Err(refused("the meeting is over already"));
        }
        if let Some(task) = lock(&meeting.task).take() {
            task.abort();
        }
        *lock(&meeting.state) = State::Failed("it was ended on this host".into());
        Ok(Done::default())
    }

    /// A person has read `code` on the partner: pin it if it is the code here. A wrong code
    /// ends the meeting.
    ///
    /// # Errors
    /// If nobody has come, the codes differ, or the partner cannot be pinned.
    pub fn meeting_confirm(self: &Arc<Self>, code: &str) -> Result<MeetingStatus, ApiError> {
        let code: Code = code.parse().map_err(refused)?;
        let meeting = self.the_meeting()?;
        let (name, met) = match meeting.state() {
            State::Came(name, met) => (name, met),
            State::Waiting(_) => {
                return Err(refused(
                    "the partner has not come yet: there is no code to confirm",
                ));
            }
            State::Pinned(name, _) => {
                return Err(refused(format!("{name} is pinned already")));
            }
            State::Failed(reason) => return Err(refused(reason)),
        };
        if met.code != code {
            let reason = format!(
                "the codes differ: {code} on the partner, {} here. Somebody may stand between the hosts: nothing was pinned. Check the cable, then begin again on both hosts",
                met.code
            );
            tracing::error!(partner = %name, "{reason}");
            *lock(&meeting.state) = State::Failed(reason.clone());
            return Err(refused(reason));
        }
        self.link_create(LinkConfig {
            partner: name.clone(),
            fingerprint: met.fingerprint.to_string(),
            next_fingerprint: None,
            links: meeting.request.links.clone(),
        })?;
        *lock(&meeting.state) = State::Pinned(name, met);
        Ok(meeting.status())
    }
}
