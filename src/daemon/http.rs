//! Answers the API ([`crate::api`]): a thin layer over [`Host`].
//!
//! Handlers decide nothing; they parse, call, and turn refusals into HTTP: 400 for a
//! request that cannot be understood, 409 for one that cannot be done now.

use super::{Host, VmCommand};
use crate::api::BODY_BYTES_MAX;
use crate::api::links::{
    ConfirmMeeting, MeetRequest, MeetingStatus, PairStatus, RotationStatus, TestRequest, TestStatus,
};
use crate::api::pool::PoolStatus;
use crate::api::types::{
    ApiError, CreateVm, Done, HostInfo, HostStatus, LinkConfig, Protect, Start, VmStatus,
};
use crate::pool::HostName;
use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, Path, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use std::sync::Arc;

/// What a handler answers.
type Answer<T> = Result<Json<T>, Refusal>;

/// A refusal with its HTTP status.
struct Refusal(StatusCode, ApiError);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Self(StatusCode::CONFLICT, error)
    }
}

/// A JSON body whose rejection is an [`ApiError`].
struct Body<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Refusal;
    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(value)) => Ok(Self(value)),
            Err(rejection) => Err(refuse(&rejection)),
        }
    }
}

fn refuse(rejection: &JsonRejection) -> Refusal {
    if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
        let error = format!(
            "the request's body is larger than {} MiB",
            BODY_BYTES_MAX >> 20
        );
        return Refusal(StatusCode::PAYLOAD_TOO_LARGE, ApiError { error });
    }
    Refusal(
        StatusCode::BAD_REQUEST,
        ApiError {
            error: format!(
                "the request's body is not understood: {}",
                rejection.body_text()
            ),
        },
    )
}

/// All routes, version 1.
pub fn router(host: Arc<Host>) -> Router {
    Router::new()
        .route("/v1/host", get(host_info))
        .route("/v1/status", get(status))
        .route("/v1/pool", get(pool))
        .route("/v1/pool/hosts/{name}/off", post(pool_off))
        .route("/v1/links", get(links).post(link_create))
        .route("/v1/links/{partner}", axum::routing::delete(link_remove))
        .route("/v1/links/{partner}/status", get(link_status))
        .route(
            "/v1/links/{partner}/test",
            get(test_status).post(test_start).delete(test_cancel),
        )
        .route(
            "/v1/meeting",
            get(meeting_status).post(meet).delete(meeting_cancel),
        )
        .route("/v1/meeting/confirm", post(meeting_confirm))
        .route(
            "/v1/rotation",
            get(rotation).post(rotation_begin).delete(rotation_give_up),
        )
        .route("/v1/vms", get(vms).post(vm_create))
        .route("/v1/vms/{name}", get(vm).delete(vm_delete))
        .route("/v1/vms/{name}/spec", get(vm_spec))
        .route("/v1/vms/{name}/start", post(vm_start))
        .route("/v1/vms/{name}/protect", post(vm_protect))
        .route("/v1/vms/{name}/{command}", post(vm_command))
        .fallback(no_such_path)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(host)
}

async fn no_such_path(request: Request) -> Refusal {
    Refusal(
        StatusCode::NOT_FOUND,
        ApiError {
            error: format!(
                "the API has no {} {}",
                request.method(),
                request.uri().path()
            ),
        },
    )
}

/// Run `work` where it may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Answer<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(Json(result?)),
        Err(e) => Err(Refusal(
            StatusCode::INTERNAL_SERVER_ERROR,
            ApiError {
                error: format!("the daemon failed on this request: {e}; see its log"),
            },
        )),
    }
}

async fn host_info(State(host): State<Arc<Host>>) -> Json<HostInfo> {
    Json(host.info())
}

async fn pool(State(host): State<Arc<Host>>) -> Answer<PoolStatus> {
    Ok(Json(host.pool_status()?))
}

async fn pool_off(State(host): State<Arc<Host>>, Path(name): Path<HostName>) -> Answer<Done> {
    blocking(move || host.pool_off(&name)).await
}

async fn status(State(host): State<Arc<Host>>) -> Json<HostStatus> {
    Json(host.status())
}

async fn links(State(host): State<Arc<Host>>) -> Json<Vec<LinkConfig>> {
    Json(host.links())
}

async fn link_create(State(host): State<Arc<Host>>, Body(link): Body<LinkConfig>) -> Answer<Done> {
    blocking(move || host.link_create(link)).await
}

async fn link_remove(State(host): State<Arc<Host>>, Path(partner): Path<String>) -> Answer<Done> {
    blocking(move || host.link_remove(&partner)).await
}

async fn link_status(
    State(host): State<Arc<Host>>,
    Path(partner): Path<String>,
) -> Answer<PairStatus> {
    blocking(move || host.pair_status(&partner)).await
}

async fn test_start(
    State(host): State<Arc<Host>>,
    Path(partner): Path<String>,
    Body(request): Body<TestRequest>,
) -> Answer<TestStatus> {
    blocking(move || host.test_start(&partner, &request)).await
}

async fn test_status(
    State(host): State<Arc<Host>>,
    Path(partner): Path<String>,
) -> Answer<TestStatus> {
    Ok(Json(host.test_status(&partner)?))
}

async fn test_cancel(
    State(host): State<Arc<Host>>,
    Path(partner): Path<String>,
) -> Answer<TestStatus> {
    Ok(Json(host.test_cancel(&partner)?))
}

async fn meet(
    State(host): State<Arc<Host>>,
    Body(request): Body<MeetRequest>,
) -> Answer<MeetingStatus> {
    blocking(move || host.meet(request)).await
}

async fn meeting_status(State(host): State<Arc<Host>>) -> Answer<MeetingStatus> {
    Ok(Json(host.meeting_status()?))
}

async fn meeting_cancel(State(host): State<Arc<Host>>) -> Answer<Done> {
    Ok(Json(host.meeting_cancel()?))
}

async fn meeting_confirm(
    State(host): State<Arc<Host>>,
    Body(confirm): Body<ConfirmMeeting>,
) -> Answer<MeetingStatus> {
    blocking(move || host.meeting_confirm(&confirm.code)).await
}

async fn rotation(State(host): State<Arc<Host>>) -> Answer<RotationStatus> {
    blocking(move || Ok(host.rotation())).await
}

async fn rotation_begin(State(host): State<Arc<Host>>) -> Answer<RotationStatus> {
    blocking(move || host.rotation_begin()).await
}

async fn rotation_give_up(State(host): State<Arc<Host>>) -> Answer<RotationStatus> {
    blocking(move || host.rotation_give_up()).await
}

async fn vms(State(host): State<Arc<Host>>) -> Json<Vec<VmStatus>> {
    Json(host.status().vms)
}

async fn vm_create(State(host): State<Arc<Host>>, Body(create): Body<CreateVm>) -> Answer<Done> {
    blocking(move || host.vm_create(&create.spec, &create.origin)).await
}

async fn vm(State(host): State<Arc<Host>>, Path(name): Path<String>) -> Answer<VmStatus> {
    Ok(Json(host.vm_status(&name)?))
}

async fn vm_spec(State(host): State<Arc<Host>>, Path(name): Path<String>) -> Answer<String> {
    Ok(Json(host.vm_spec(&name)?))
}

async fn vm_delete(State(host): State<Arc<Host>>, Path(name): Path<String>) -> Answer<Done> {
    blocking(move || host.vm_delete(&name)).await
}

async fn vm_start(
    State(host): State<Arc<Host>>,
    Path(name): Path<String>,
    Body(start): Body<Start>,
) -> Answer<Done> {
    blocking(move || host.vm_start(&name, start.force)).await
}

async fn vm_protect(
    State(host): State<Arc<Host>>,
    Path(name): Path<String>,
    Body(protect): Body<Protect>,
) -> Answer<Done> {
    blocking(move || host.vm_protect(&name, protect.partner)).await
}

async fn vm_command(
    State(host): State<Arc<Host>>,
    Path((name, command)): Path<(String, String)>,
) -> Answer<Done> {
    let command = match command.as_str() {
        "stop" => VmCommand::Stop,
        "unprotect" => VmCommand::Unprotect,
        "switchover" => VmCommand::Switchover,
        _ => {
            return Err(Refusal(
                StatusCode::NOT_FOUND,
                ApiError {
                    error: format!(
                        "a VM has no command `{command}`; there are start, stop, protect, unprotect, switchover"
                    ),
                },
            ));
        }
    };
    blocking(move || host.vm_command(&name, command)).await
}
